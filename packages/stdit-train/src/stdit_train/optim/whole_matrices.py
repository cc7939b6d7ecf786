"""Compute on whole matrices whose rows are sharded over ranks: each is gathered on one rank, its owner.

    rank 0  rows of A, B, C      all-to-all       A, C -> results       all-to-all       rows of the results
    rank 1  rows of A, B, C     ------------>     B    -> results      ------------>     rows of the results

Two messages for all matrices together, and every matrix is computed once. Gathered one by one on all ranks, each takes
several messages, and every rank computes all of them (distributed Muon: arXiv:2502.16982, section 2.3; Dion:
arXiv:2504.05295).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]


def map_whole_matrices(
    compute: Callable[[Tensor], Tensor], shards: Sequence[Tensor], shapes: Sequence[Shape], group: dist.ProcessGroup
) -> list[Tensor]:
    """Apply a function to matrices that are sharded by rows; every rank of the group must call this.

    Args:
        compute: takes a whole matrix [m, n] and returns one of the same shape and dtype.
        shards: this rank's rows of each matrix, of one dtype; rank r has the r-th part of `torch.chunk`, as in FSDP2.
        shapes: [m, n] of each whole matrix.
        group: ranks that have the shards.

    Returns:
        This rank's rows of each result.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owned = deal(tuple(tuple(shape) for shape in shapes), size)
    rows = {i: _rows(shapes[i][0], size) for i in owned[rank]}
    theirs = [sum(shards[i].numel() for i in matrices) for matrices in owned]  # elements, by owner
    mine = [sum(rows[i][source] * shapes[i][1] for i in owned[rank]) for source in range(size)]

    received = _exchange([shards[i] for matrices in owned for i in matrices], theirs, mine, shards[0], group)
    pieces = received.split([rows[i][source] * shapes[i][1] for source in range(size) for i in owned[rank]])
    results = []
    for number, i in enumerate(owned[rank]):
        whole = torch.cat(pieces[number :: len(owned[rank])]).view(shapes[i])
        results.append(compute(whole).split(rows[i]))
    own_rows = [result[source] for source in range(size) for result in results]
    del received, pieces  # before the second message takes memory

    received = _exchange(own_rows, mine, theirs, shards[0], group)
    order = [i for matrices in owned for i in matrices]
    pieces = received.split([shards[i].numel() for i in order])
    found = {i: piece.view(shards[i].shape) for i, piece in zip(order, pieces, strict=True)}
    return [found[i] for i in range(len(shards))]


@lru_cache(maxsize=8)
def deal(shapes: tuple[Shape, ...], ranks: int) -> list[list[int]]:
    """Return the matrices that each rank owns: the costliest first, each to the rank with the least to do so far.

    The cost of [m, n] with m <= n is that of its products with its transpose, m^2 n.
    """
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owner = loads.index(min(loads))
        owned[owner].append(i)
        loads[owner] += costs[i]
    return owned


def _rows(count: int, ranks: int) -> list[int]:
    """Return the rows that each rank has of a matrix."""
    most = -(-count // ranks)
    return [max(0, min(most, count - rank * most)) for rank in range(ranks)]


def _exchange(
    parts: Sequence[Tensor], sent: list[int], received: list[int], like: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[r]` elements of the parts, one after the other, to each rank r; return what the ranks sent."""
    message = torch.cat([like.new_empty(0), *(part.flatten() for part in parts)])
    output = like.new_empty(sum(received))
    dist.all_to_all_single(output, message, received, sent, group=group)
    return output
