"""Compare the tensors of a checkpoint with those of a model: none missing, none unexpected, every shape equal."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stdit_model.errors import few
from stdit_model.weights.files import StoredTensor


class KeyMatch(NamedTuple):
    """The result of `fit`."""

    tensors: dict[str, StoredTensor]  # those that the model takes
    new: tuple[str, ...]  # the model's names that the file lacks, and may lack
    unused: tuple[str, ...]  # the file's names that the model has no use for, as expected
    complaints: str  # what else is missing, unexpected or of another shape; empty if nothing is


def fit(
    expected_shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, StoredTensor],
    new: Callable[[str], bool] = lambda name: False,
    unused: Callable[[str], bool] = lambda name: False,
) -> KeyMatch:
    """Match the tensors of a file, under STDiT's names, with those that a model expects.

    Args:
        expected_shapes: of the model's tensors by name (`STDiT.parameter_shapes`).
        tensors: of the file.
        new: whether the file may lack a name of the model.
        unused: whether the model may have no use for a name of the file.
    """
    wanted = {name: shape for name, shape in expected_shapes.items() if name in tensors or not new(name)}
    offered = {name: tensor for name, tensor in tensors.items() if name in expected_shapes or not unused(name)}
    return KeyMatch(
        offered,
        tuple(name for name in expected_shapes if name not in wanted),
        tuple(name for name in tensors if name not in offered),
        differences(offered, wanted),
    )


def differences(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Describe in one line which tensors are missing, unexpected or of another shape; empty if none are."""
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
