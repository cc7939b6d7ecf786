"""Values for the weights of a sharded model: fresh, from a file, or from another sharded model.

No process holds more than a block (fresh) or a tensor (a file) of the whole at a time.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from stdit_model import STDiT
from stdit_model.blocks import mixings
from stdit_model.errors import WeightsError, few
from stdit_model.weights import Weights


def fresh(arguments: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial weights by name, a function of the seed alone, however many processes there are.

    They are drawn with STDiT's own initialisation, a block (latte: a pair of blocks) at a time.

    Args:
        arguments: STDiT's.
        seed: of the run.
    """
    known = inspect.signature(STDiT.__init__).parameters
    depth, variant = (arguments.get(name, known[name].default) for name in ("depth", "variant"))
    kinds = len(set(mixings(variant, depth)))
    for first in range(0, depth, kinds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([seed, first]).generate_state(1)[0]))
            part = STDiT(**{**arguments, "depth": min(kinds, depth - first)})
        for name, tensor in part.state_dict().items():
            head, _, rest = name.partition(".")
            if head == "blocks":
                number, _, leaf = rest.partition(".")
                yield f"blocks.{first + int(number)}.{leaf}", tensor
            elif first == 0:
                yield name, tensor


def stored(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A file's weights by name, read one at a time."""
    for name, tensor in weights.tensors.items():
        yield name, tensor.read()


@torch.no_grad()
def fill(model: STDiT, tensors: Iterable[tuple[str, Tensor]], *, partly: bool = False) -> None:
    """Give a sharded model (or a whole one) weights: every process reads all of them and keeps its shards.

    Args:
        model: filled in place.
        tensors: whole tensors by name; the same on every process.
        partly: some may be missing.

    Raises:
        WeightsError: a tensor missing, unknown or of another shape.
    """
    targets = model.state_dict()
    missing = set(targets)
    for name, tensor in tensors:
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            expected = "no such tensor" if target is None else list(target.shape)
            raise WeightsError(f"{name} of shape {list(tensor.shape)}: this model has {expected}")
        if isinstance(target, DTensor):
            tensor = tensor.to(target.to_local().device, target.dtype)
            own = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(own.to_local())
        else:
            target.copy_(tensor)
        missing.discard(name)
    if missing and not partly:
        raise WeightsError(f"{len(missing)} tensors are missing: {few(sorted(missing))}")


@torch.no_grad()
def copy_shards(source: STDiT, destination: STDiT) -> None:
    """One model's weights into another over the same mesh, shard by shard, without a message."""
    values = source.state_dict()
    for name, target in destination.state_dict().items():
        target.copy_(values[name])
