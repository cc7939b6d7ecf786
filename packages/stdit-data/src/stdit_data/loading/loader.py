"""Batches for training: the order decides, threads read ahead, and the state is a few integers.

A global batch (the samples of one optimiser step) is fixed by `order.Order`. Rank r of R takes its r-th part, cut into
micro-batches of equal size, so any number of ranks trains on the same samples in the same steps.
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
from stdit_data.loading.prefetch import Batch, Share, read_ahead
from stdit_data.loading.rejects import Rejects

__all__ = ["Batch", "ClipLoader"]

# Loaders with reading threads: a thread that computes while the interpreter shuts down would end the process by abort.
_open: weakref.WeakSet[ClipLoader] = weakref.WeakSet()

HINTS = {
    "fingerprint": "the global batch, the buckets or the weights have changed",
    "clips": "the dataset lists other clips, or the same in another order",
}


class ClipLoader:
    """Endless batches of a dataset, one list of micro-batches per optimiser step.

    Iterating goes on from the current position; `state_dict` speaks of the steps yielded so far, whatever has been
    read ahead. A clip that can't be read is logged; its slot repeats the next readable sample of the same global
    batch, no other slot changes, and `Batch.repeats` counts it. This too is independent of ranks and workers.

    Args:
        dataset: what to read.
        global_batch: samples per optimiser step over all ranks and micro-batches; one number, or one per bucket
            (`buckets.batch_sizes` gives them from a token budget).
        seed: of the order and of every sample's randomness.
        rank, world_size: this data-parallel rank of how many; `world_size` must divide `global_batch`.
        micro_batch: at most this many samples at once (one number, or one per bucket): the largest divisor of the
            rank's share that is no greater is used. Without it, the whole share.
        workers: threads that read clips; 0 reads in the prefetching thread.
        prefetch: steps read ahead; with 0 (and no workers) all is read when asked for.
        shuffle: a new order every epoch.
        rejects: file (JSON lines) that unreadable clips are appended to, each once. Ranks after the first write
            beside it, with `.rank1` and so on before the suffix.
        max_reject_share: stop when more than this share of the samples that this rank has seen can't be read, with a
            margin for chance while it hasn't seen all.
        pin_memory: put videos in pinned memory; needs CUDA.

    Attributes:
        accumulation: micro-batches per step on this rank; with several buckets the most that a step can have.
        order: the order of all global batches.

    Raises:
        DataError: settings that don't fit together.
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
        shuffle: bool = True,
        rejects: str | Path | None = None,
        max_reject_share: float = 0.1,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size}: expected a rank from 0 to {world_size - 1}")
        if workers < 0 or prefetch < 0:
            raise DataError(f"workers {workers}, prefetch {prefetch}: expected numbers from 0")
        if pin_memory and not torch.cuda.is_available():
            raise DataError("pin_memory: needs CUDA, which is not available here")
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory
        make_order = getattr(dataset, "make_order", Order)  # a cache has an order of its own
        self.order: Order = make_order(
            [dataset.bucket(index) for index in range(len(dataset))],
            global_batch=global_batch,
            seed=seed,
            shuffle=shuffle,
            weights=getattr(dataset, "weights", None),
        )
        self._shares = {
            bucket: _share(bucket, size, world_size, micro_batch)
            for bucket, size in zip(self.order.buckets, self.order.sizes, strict=True)
        }
        self.accumulation = max(share.samples // share.micro for share in self._shares.values())
        self._identity: int | None = getattr(dataset, "identity", None)
        self._rejects = Rejects(rejects, samples=len(dataset), rank=rank, max_share=max_reject_share)
        self._epoch = self._batch = self._step = 0
        # Weak, so that the threads end as soon as the iterator is dropped, as by a break out of a loop over it.
        self._reading: weakref.ref[Generator[list[Batch], None, None]] | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches for one optimiser step after another; never ends, epochs follow one another.

        With several buckets the length of the list may differ from step to step; it is the same on all ranks. A
        second call ends the iterator of the first.

        Raises:
            DataError: more clips than `max_reject_share` are bad, or all of a global batch.
        """
        self.close()
        steps = self._steps()
        self._reading = weakref.ref(steps)
        _open.add(self)
        return steps

    def close(self) -> None:
        """Ends the reading threads, as dropping the iterator does. The position stays; iterating again goes on."""
        reading = self._reading() if self._reading is not None else None
        if reading is not None:
            reading.close()
        self._reading = None
        _open.discard(self)

    def state_dict(self) -> dict[str, int]:
        """The position after the last step yielded, as integers fit for JSON; the same on every rank."""
        state = {
            "epoch": self._epoch,
            "batch": self._batch,
            "step": self._step,
            "seed": self.seed,
            "samples": self.order.samples,
            "fingerprint": self.order.fingerprint(),
        }
        return state if self._identity is None else {**state, "clips": self._identity}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a position, of a run with any number of ranks, workers and micro-batches.

        Raises:
            DataError: the state is of another order: another seed, dataset or global batch.
        """
        mine = self.state_dict()
        if missing := mine.keys() - state.keys():
            raise DataError(f"loader state: {', '.join(sorted(missing))} missing; expected {', '.join(mine)}")
        for key in ("seed", "samples", "clips", "fingerprint"):
            if state.get(key) != mine.get(key):
                hint = f" ({HINTS[key]})" if key in HINTS else ""
                raise DataError(
                    f"loader state: {key} is {state.get(key)} there and {mine.get(key)} here{hint}; resume with the "
                    "same seed, dataset and global batch, or start the data anew"
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
            pin_memory=self.pin_memory,
        )
        with closing(steps):  # the threads end here, also after an error, whose traceback keeps this frame alive
            for done in steps:
                share = self._shares[done.plan.bucket].samples
                mine = done.plan.slots[self.rank * share : (self.rank + 1) * share]
                self._rejects.count(mine, done.rejects, epoch=done.plan.epoch, step=self._step)
                if done.fault is not None:
                    raise done.fault
                self._epoch, self._batch, self._step = done.plan.epoch, done.plan.batch + 1, self._step + 1
                yield done.batches


@atexit.register
def _close_all() -> None:
    for loader in list(_open):
        loader.close()


def _share(bucket: Bucket, size: int, world_size: int, limit: int | Mapping[Bucket, int] | None) -> Share:
    if size % world_size:
        raise DataError(
            f"global_batch {size} (bucket {bucket}) can't be shared by {world_size} ranks; expected a multiple of "
            f"{world_size}, such as {-(-size // world_size) * world_size}"
        )
    samples = size // world_size
    most = limit.get(bucket, samples) if isinstance(limit, Mapping) else samples if limit is None else limit
    if most < 1:
        raise DataError(f"micro_batch {most}: expected at least 1")
    return Share(samples, micro=max(n for n in range(1, samples + 1) if samples % n == 0 and n <= most))
