"""A resumable encoding job: shards that processes share by rank and write independently of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import Part, Shard

SHARD_BYTES = 256 * 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Progress = Callable[[int, int], None]  # entries done, and in total, of this process
EncodeShard = Callable[[Sequence[int], Callable[[], None]], Shard]  # items, and what to call after each, to their shard


class Job:
    """Encodes one part of a cache.

    Args:
        out: folder or URL of the cache.
        part: the part to encode.
        metadata: written to the cache, or compared with what is there.
        shards: the items of each shard.
        encode: encodes the items of one shard.
        rank, world: this process, and the number of processes that share the shards.

    Attributes:
        total: entries in this process's shards.
        done: entries of them in finished shards.

    Raises:
        DataError: the folder holds a part encoded with other settings, or the rank is out of range.
    """

    def __init__(
        self,
        out: str,
        part: Part,
        metadata: Mapping[str, Any],
        shards: Sequence[Sequence[int]],
        encode: EncodeShard,
        rank: int,
        world: int,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world}: expected a rank from 0 to {world - 1}")
        self.out, self.part, self.shards, self._encode = out, part, shards, encode
        cache.lock_metadata(out, part, metadata)
        finished = cache.list_shards(out, part)
        mine = range(rank, len(shards), world)
        self.total = sum(len(shards[number]) for number in mine)
        self.done = sum(len(shards[number]) for number in mine if number in finished)
        self.missing = [number for number in mine if number not in finished]

    def run(self, progress: Progress = lambda done, total: None) -> bool:
        """Encode this process's missing shards; write the index if that completes the part.

        Returns:
            Whether the part is complete; False while other processes are encoding.

        Raises:
            DataError: a shard can't be encoded or written.
        """
        cache.remove_partials(self.out, self.part, [cache.shard_name(number) for number in self.missing])

        def on_entry() -> None:
            self.done += 1
            progress(self.done, self.total)

        for number in self.missing:
            cache.write_shard(self.out, self.part, number, self._encode(self.shards[number], on_entry))
        self.missing = []
        if len(cache.list_shards(self.out, self.part)) < len(self.shards):
            return False
        cache.write_index(self.out, self.part, len(self.shards))
        cache.remove_partials(self.out, self.part)
        return True


def parse_dtype(name: str) -> torch.dtype:
    """Return the storage dtype of a name.

    Raises:
        DataError: the name is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise DataError(f"dtype {name!r}: expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def split_into_shards(sizes: Sequence[int], shard_bytes: int) -> list[range]:
    """Split items into consecutive runs of at most `shard_bytes` and at least one item each.

    Args:
        sizes: bytes of each item.
        shard_bytes: most bytes of a shard.
    """
    shards, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > shard_bytes:
            shards.append(range(start, i))
            start, total = i, 0
        total += size
    shards.append(range(start, len(sizes)))
    return shards
