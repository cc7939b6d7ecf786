"""Whether tensors are exactly those of a model: nothing missing, nothing left over, every shape the same."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from stdit_model.errors import WeightsError, few
from stdit_model.weights.files import LazyTensor


class KeyMatch(NamedTuple):
    """How a file's tensors match a model's: see `fit`."""

    tensors: dict[str, LazyTensor]  # what the model takes
    new: tuple[str, ...]  # the model's names that the file lacks and may lack
    unused: tuple[str, ...]  # the file's names that the model has no use for, as expected
    complaints: str  # what else is missing, left over or of another shape; empty if nothing is


def fit(
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    new: Callable[[str], bool] = lambda name: False,
    unused: Callable[[str], bool] = lambda name: False,
) -> KeyMatch:
    """Match tensors, under STDiT's names, with those of the model that `config` describes.

    Args:
        new: tells the names that the file may lack.
        unused: tells the names that the model has no use for.
    """
    expected = shapes(config)
    wanted = {name: shape for name, shape in expected.items() if name in tensors or not new(name)}
    offered = {name: tensor for name, tensor in tensors.items() if name in expected or not unused(name)}
    return KeyMatch(
        offered,
        tuple(name for name in expected if name not in wanted),
        tuple(name for name in tensors if name not in offered),
        differences(offered, wanted),
    )


def differences(tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What doesn't fit, in one line; empty if all does."""
    kinds = {
        "missing keys": sorted(expected.keys() - tensors.keys()),
        "unexpected keys": sorted(tensors.keys() - expected.keys()),
        "tensors of other shapes": [
            f"{name} is {list(tensors[name].shape)}, not {list(expected[name])}"
            for name in sorted(tensors.keys() & expected.keys())
            if tensors[name].shape != expected[name]
        ],
    }
    return "; ".join(f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of an STDiT's tensors by name, without making them.

    Raises:
        WeightsError: an argument that STDiT doesn't have.
    """
    from stdit_model.model import STDiT  # which imports this module

    unknown = sorted(config.keys() - inspect.signature(STDiT.__init__).parameters.keys())
    if unknown:
        raise WeightsError(f"STDiT has no argument {few(unknown)}: was this written by a newer version?")
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in STDiT(**config).state_dict().items()}
