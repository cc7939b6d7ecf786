"""Memory of Muon: its state, and the buffers in which matrices are whole."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stdit_model import STDiT
from stdit_train.optim.optimizers import hidden_matrices
from stdit_train.optim.whole_matrices import deal


@dataclass(frozen=True)
class MuonMemory:
    """What Muon needs on a process.

    Attributes:
        elements: of the matrices that it updates, this process's rows.
        buffers: bytes besides weights, gradients and state in its step.
    """

    elements: int = 0
    buffers: int = 0


def muon_memory(arguments: Mapping[str, Any], shards: int = 1, itemsize: int = 2) -> MuonMemory:
    """Return what Muon needs for the hidden matrices of a model.

    Args:
        arguments: all of STDiT's constructor.
        shards: that the rows of each matrix are in.
        itemsize: bytes of an element while it is orthogonalised: 2 on a GPU, 4 on a CPU.
    """
    shapes = _matrices(tuple(sorted(arguments.items())))
    sizes = [math.prod(shape) for shape in shapes]
    if shards == 1:  # one after the other: the last update, this one, and what a Newton-Schulz step reads and writes
        alive = zip([0, *sizes], sizes, shapes, strict=False)
        most = max(last + 3 * size + 3 * min(shape) ** 2 for last, size, shape in alive)
        return MuonMemory(sum(sizes), itemsize * most)
    rows = sum(-(-shape[0] // shards) * shape[1] for shape in shapes)
    owned = max(sum(sizes[i] for i in matrices) for matrices in deal(shapes, shards))
    # at the second message: the rows of all updates, the results of the owned ones, and both again as sent and received
    return MuonMemory(rows, 2 * itemsize * (rows + owned))


@lru_cache(maxsize=8)
def _matrices(arguments: tuple[tuple[str, Any], ...]) -> tuple[tuple[int, ...], ...]:
    with torch.device("meta"):
        return tuple(tuple(matrix.shape) for matrix in hidden_matrices(STDiT(**dict(arguments))))
