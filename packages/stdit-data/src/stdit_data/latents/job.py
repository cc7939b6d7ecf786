""""""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import Part

SHARD_BYTES = 256 * 2**20


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


Progress = Callable[[int, int], None]  # entries done and in all, of this process


class Job:
    """One part of a cache in the making: which shards there are, and how each comes about.

    Attributes:
        total: entries in this process's share of the shards.
        done: those of them that are finished.
    """

    def __init__(
        self, out: str, part: Part, about: Mapping[str, Any], shards: Sequence[range], make: Any, rank: int, world: int
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world}: expected a rank from 0 to {world - 1}")
        self.out, self.part, self.shards, self._make = out, part, shards, make
        cache.lock_metadata(out, part, about)
        there = cache.list_shards(out, part)
        mine = range(rank, len(shards), world)
        self.total = sum(len(shards[number]) for number in mine)
        self.done = sum(len(shards[number]) for number in mine if number in there)
        self.missing = [number for number in mine if number not in there]

    def run(self, progress: Progress = lambda done, total: None) -> bool:
        """Makes this process's missing shards; whoever finds all there writes the index.

        Returns:
            Whether the part is complete; False while other processes are at theirs.
        """
        cache.remove_partials(self.out, self.part, [cache.shard_name(number) for number in self.missing])

        def one_more() -> None:
            self.done += 1
            progress(self.done, self.total)

        for number in self.missing:
            cache.write_shard(self.out, self.part, number, self._make(self.shards[number], one_more))
        self.missing = []
        if len(cache.list_shards(self.out, self.part)) < len(self.shards):
            return False
        cache.write_index(self.out, self.part, len(self.shards))
        cache.remove_partials(self.out, self.part)
        return True


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise DataError(f"dtype {name!r}: expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def _cut(sizes: Sequence[int], most: int) -> list[range]:
    """Consecutive runs, each as long as its sum stays within `most` (and at least one)."""
    shards, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            shards.append(range(start, i))
            start, total = i, 0
        total += size
    shards.append(range(start, len(sizes)))
    return shards
