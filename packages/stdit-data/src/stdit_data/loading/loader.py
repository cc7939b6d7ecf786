"""Load batches for training: in a fixed order, read ahead by threads, resumable from a few integers.

A global batch (the samples of one optimizer step) is fixed by `order.Order`. Rank r of R takes its r-th part, split
into micro-batches of equal size, so any number of ranks trains on the same samples in the same steps.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from stdit_data.buckets import Bucket
from stdit_data.clip import ClipDataset
from stdit_data.errors import DataError
from stdit_data.loading.order import Order
from stdit_data.loading.prefetch import Batch, Draw, RankShare, read_ahead
from stdit_data.loading.rejects import Rejects
from stdit_data.storage import readers

__all__ = ["Batch", "ClipLoader"]

# Loaders with running threads: a thread that computes while the interpreter shuts down would abort the process.
_open: weakref.WeakSet[ClipLoader] = weakref.WeakSet()

PREFETCH_BYTES = 1 << 30

HINTS = {
    "fingerprint": "the global batch, the buckets or the weights have changed",
    "clips": "the data set lists other clips, or the same in another order",
}


class ClipLoader:
    """Yields batches of a data set without end, one list of micro-batches per optimizer step.

    Iteration starts at the current position; `state_dict` counts the steps yielded, not those read ahead. A clip that
    can't be read is logged; its slot repeats the next readable sample of the same global batch, no other slot changes,
    and `Batch.repeats` counts it. This is independent of ranks and workers too.

    Args:
        dataset: the data set to read.
        global_batch: samples per optimizer step over all ranks and micro-batches; one number, or one per bucket
            (`buckets.batch_sizes` computes them from a token budget).
        seed: seed of the order and of every sample's randomness.
        rank, world_size: data-parallel rank, and their number, which must divide `global_batch`.
        micro_batch: most samples in a micro-batch (one number, or one per bucket); the largest divisor of the rank's
            part of the global batch up to this is used. By default the whole part.
        workers: number of threads that read clips; 0 reads in the prefetching thread.
        prefetch: number of steps to read ahead; with 0 and no workers everything is read on demand.
        prefetch_bytes: most bytes of clips to read ahead, or one step's if that is more. The step in use is not
            counted, nor a second copy of a micro-batch while it is stacked and pinned.
        shuffle: shuffle in every epoch.
        rejects: file (JSON lines) that unreadable clips are appended to, each once. Ranks after the first write
            beside it, with `.rank1` and so on before the suffix.
        max_reject_share: stop when more than this share of the samples seen by this rank can't be read, with a margin
            for chance until it has seen all.
        pin_memory: put videos and random numbers in pinned memory; needs CUDA.
        draw: called in the reading threads with each slot (sample and epoch) and its bucket; returns random numbers by
            name, which are stacked into `Batch.draws`.

    Attributes:
        accumulation: micro-batches per step on this rank; with several buckets the largest of them.
        order: the order of all global batches.

    Raises:
        DataError: a setting is out of range, or settings don't fit together.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        global_batch: int | Mapping[Bucket, int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | Mapping[Bucket, int] | None = None,
        workers: int = 2,
        prefetch: int = 2,
        prefetch_bytes: int = PREFETCH_BYTES,
        shuffle: bool = True,
        rejects: str | Path | None = None,
        max_reject_share: float = 0.1,
        pin_memory: bool = False,
        draw: Draw | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size}: expected a rank from 0 to {world_size - 1}")
        if min(workers, prefetch, prefetch_bytes) < 0:
            raise DataError(
                f"workers {workers}, prefetch {prefetch}, prefetch_bytes {prefetch_bytes}: expected numbers from 0"
            )
        if pin_memory and not torch.cuda.is_available():
            raise DataError("pin_memory: needs CUDA, which is not available here")
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self.workers, self.prefetch, self.prefetch_bytes = workers, prefetch, prefetch_bytes
        self.pin_memory, self.draw = pin_memory, draw
        make_order = getattr(dataset, "make_order", Order)  # a cache defines its own order
        self.order: Order = make_order(
            getattr(dataset, "bucket_column", None) or [dataset.bucket(index) for index in range(len(dataset))],
            global_batch=global_batch,
            seed=seed,
            shuffle=shuffle,
            weights=getattr(dataset, "weights", None),
        )
        self._shares = {
            bucket: _rank_share(bucket, size, world_size, micro_batch)
            for bucket, size in zip(self.order.buckets, self.order.sizes, strict=True)
        }
        self.accumulation = max(share.samples // share.micro for share in self._shares.values())
        self._identity: int | None = getattr(dataset, "identity", None)
        self._rejects = Rejects(rejects, samples=len(dataset), rank=rank, max_share=max_reject_share)
        self._epoch = self._batch = self._step = 0
        # Weak, so that the threads end as soon as the iterator is dropped, as by a break out of its loop.
        self._iterator: weakref.ref[Generator[list[Batch], None, None]] | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each optimizer step, over one epoch after another.

        With several buckets the length of the list may differ between steps; it is the same on all ranks. A second call
        ends the iterator of the first.

        Raises:
            DataError: more clips than `max_reject_share` can't be read, or none of a global batch.
        """
        self.close()
        steps = self._steps()
        self._iterator = weakref.ref(steps)
        _open.add(self)
        return steps

    def close(self) -> None:
        """End the threads, as dropping the iterator does. The position is kept for the next iteration."""
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            iterator.close()
        self._iterator = None
        _open.discard(self)

    @property
    def position(self) -> dict[str, int]:
        """The part of `state_dict` that changes from step to step."""
        return {"epoch": self._epoch, "batch": self._batch, "step": self._step}

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last step yielded, as integers; the same on every rank."""
        state = {
            **self.position,
            "seed": self.seed,
            "samples": self.order.samples,
            "fingerprint": self.order.fingerprint(),
        }
        return state if self._identity is None else {**state, "clips": self._identity}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Move to a position saved with any number of ranks, workers and micro-batches.

        Raises:
            DataError: the state belongs to another seed, data set or global batch.
        """
        mine = self.state_dict()
        if missing := mine.keys() - state.keys():
            raise DataError(f"loader state: {', '.join(sorted(missing))} missing; expected {', '.join(mine)}")
        for key in ("seed", "samples", "clips", "fingerprint"):
            if state.get(key) != mine.get(key):
                hint = f" ({HINTS[key]})" if key in HINTS else ""
                raise DataError(
                    f"loader state: {key} is {state.get(key)} in the state and {mine.get(key)} here{hint}; resume with "
                    "the same seed, data set and global batch, or start a new run"
                )
        self.close()
        self._epoch, self._batch, self._step = state["epoch"], state["batch"], state["step"]

    def _steps(self) -> Generator[list[Batch], None, None]:
        steps = read_ahead(
            self.dataset,
            self.order.from_cursor(self._epoch, self._batch),
            self._shares,
            seed=self.seed,
            rank=self.rank,
            step=self._step,
            workers=self.workers,
            prefetch=self.prefetch,
            prefetch_bytes=self.prefetch_bytes,
            pin_memory=self.pin_memory,
            draw=self.draw,
        )
        with closing(steps):  # the threads end here, also after an error, whose traceback keeps this frame alive
            for step in steps:
                plan, share = step.plan, self._shares[step.plan.bucket].samples
                mine = plan.slots[self.rank * share : (self.rank + 1) * share]
                self._rejects.count(mine, step.rejects, epoch=plan.epoch, step=self._step)
                if step.error is not None:
                    raise step.error
                self._epoch, self._batch, self._step = plan.epoch, plan.batch + 1, self._step + 1
                yield step.batches


@atexit.register
def _close_all() -> None:
    readers.release()
    for loader in list(_open):
        loader.close()


def _rank_share(bucket: Bucket, size: int, world_size: int, limit: int | Mapping[Bucket, int] | None) -> RankShare:
    if size % world_size:
        raise DataError(
            f"global_batch {size} (bucket {bucket}) can't be divided among {world_size} ranks; expected a multiple of "
            f"{world_size}, such as {-(-size // world_size) * world_size}"
        )
    samples = size // world_size
    most = limit.get(bucket, samples) if isinstance(limit, Mapping) else samples if limit is None else limit
    if most < 1:
        raise DataError(f"micro_batch {most}: expected at least 1")
    return RankShare(samples, micro=max(n for n in range(1, samples + 1) if samples % n == 0 and n <= most))
