"""A resumable encoding job: the missing shards of a part of a cache, and where they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import Part, Shard
from stdit_data.workers.executors import Executor, Inline
from stdit_data.workers.work import Progress, Share, run_shards

SHARD_BYTES = 256 * 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

EncodeShard = Callable[[Sequence[Any], Callable[[], None]], Shard]  # items, and what to call after each, to their shard


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Attributes:
        share: which shards are this process's.
        executor: where they are encoded. Those in other processes write their shards themselves.
        gpus: GPUs per worker of a Ray cluster.
    """

    share: Share = field(default_factory=Share)
    executor: Executor = field(default_factory=Inline)
    gpus: float = 0.0


class Job:
    """Encodes one part of a cache.

    Args:
        out: folder or URL of the cache.
        part: the part to encode.
        metadata: written to the cache, or compared with what is there.
        shards: the items of each shard.
        open_encoder: returns what encodes the items of a shard; called once in each process that encodes.
        place: where it runs; here by default.

    Attributes:
        total: entries in this process's shards.
        done: entries of them in finished shards.

    Raises:
        DataError: the folder holds a part encoded with other settings.
    """

    def __init__(
        self,
        out: str,
        part: Part,
        metadata: Mapping[str, Any],
        shards: Sequence[Sequence[Any]],
        open_encoder: Callable[[], EncodeShard],
        place: Place | None = None,
    ) -> None:
        self.out, self.part, self.metadata, self.shards = out, part, metadata, shards
        self.place = place = place or Place()
        self._open_encoder: Callable[[], EncodeShard] | None = open_encoder
        cache.lock_metadata(out, part, metadata)
        finished = cache.list_shards(out, part)
        self._mine = place.share.of(len(shards))
        self.total = sum(len(shards[number]) for number in self._mine)
        self.done = sum(len(shards[number]) for number in self._mine if number in finished)
        self.missing = [number for number in self._mine if number not in finished]

    def run(self, progress: Progress = lambda done, total: None) -> bool:
        """Encode this process's missing shards; write the index if that completes the part.

        Args:
            progress: called with entries done and in total: after each entry where the shards are encoded in this
                process, else after each shard.

        Returns:
            Whether the part is complete; False while other processes are encoding.

        Raises:
            DataError: a shard can't be encoded or written.
        """
        if self.missing and self._open_encoder is not None:
            self._encode_missing(self._open_encoder, progress)
        self._open_encoder = None  # frees its model
        self.missing = []
        finished = cache.list_shards(self.out, self.part)
        if unseen := [number for number in self._mine if number not in finished]:
            raise DataError(
                f"{self.out}: a worker wrote {cache.shard_name(unseen[0])} where this process can't see it; encode "
                "into a folder that all machines of the cluster share, by its full path, or into a URL"
            )
        if len(finished) < len(self.shards):
            return False
        cache.write_index(self.out, self.part, len(self.shards))
        cache.remove_partials(self.out, self.part, range(len(self.shards)))
        return True

    def _encode_missing(self, open_encoder: Callable[[], EncodeShard], progress: Progress) -> None:
        cache.remove_partials(self.out, self.part, self.missing)

        def on_entry() -> None:
            self.done += 1
            progress(self.done, self.total)

        whole = self.done

        def finish(number: int, entries: int) -> None:
            nonlocal whole
            whole += entries
            self.done = whole
            progress(self.done, self.total)

        separate = self.place.executor.separate
        run_shards(
            _Encode(self.out, self.part, self.metadata, open_encoder, self.place.gpus, None if separate else on_entry),
            [(number, (number, self.shards[number])) for number in self.missing],
            self.place.executor,
            finish,
            total=len(self.shards),
            kept=self.out,
            ends=(DataError,),
        )


@dataclass(frozen=True)
class _Encode:
    """The task of a job: encodes a shard and writes it, so that no tensor passes between processes."""

    out: str
    part: Part
    metadata: Mapping[str, Any]
    open: Callable[[], EncodeShard]
    gpus: float
    on_entry: Callable[[], None] | None

    has_model = True

    @property
    def name(self) -> str:
        return f"encode ({self.part})"

    def run(self, shard: tuple[int, Sequence[Any]], opened: EncodeShard) -> int:
        """Return the number of entries."""
        number, items = shard
        encoded = opened(items, self.on_entry or (lambda: None))
        cache.check_metadata(self.out, self.part, self.metadata)
        cache.write_shard(self.out, self.part, number, encoded)
        return len(items)


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
