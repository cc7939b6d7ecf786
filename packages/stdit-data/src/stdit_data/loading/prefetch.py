"""Read batches ahead: the torchdata.nodes graph of the loader. It maps and prefetches; the order is given to it.

    slots of this rank, in order -> read each (threads, results in order) -> stack into micro-batches -> prefetch -> pin

How far ahead is limited twice: in steps, by the prefetching node, and in bytes, by `ByteBudget` at the head.

b samples of a micro-batch, C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, PinMemory, Prefetcher

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.loading.budget import ByteBudget
from stdit_data.loading.order import GlobalBatch, Slot
from stdit_data.storage import readers
from stdit_data.transforms import stack_videos

Draw = Callable[[Slot, Bucket], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch."""

    video: Tensor  # [b, C, T, H, W], as `Clip.video` without b
    captions: list[str]
    indices: list[int]  # the samples in the batch; for an unreadable one, the sample that stands in for it
    fps: list[float]  # frames per second of each clip
    bucket: Bucket
    epoch: int
    step: int  # optimizer steps before this one, since the start of the run
    repeats: int  # samples that stand in for unreadable ones
    texts: list[Tensor] | None = None  # [L, D] each, without padding, if the data set has cached them
    starts: list[float] | None = None  # seconds from the first frame of each clip's video to the clip's first
    draws: dict[str, Tensor] | None = None  # [b, ...], the random numbers that the loader's `draw` returned, by name

    def pin_memory(self) -> Batch:
        """Return the batch with `video` and `draws` in pinned memory."""
        draws = self.draws and {name: numbers.pin_memory() for name, numbers in self.draws.items()}
        return replace(self, video=self.video.pin_memory(), draws=draws)


@dataclass(frozen=True, slots=True)
class RankShare:
    """One rank's part of a bucket's global batch."""

    samples: int
    micro: int  # samples per micro-batch; divides `samples`


@dataclass(slots=True)
class Step:
    """One optimizer step's micro-batches on this rank, and the errors met while reading them."""

    plan: GlobalBatch
    batches: list[Batch] = field(default_factory=list)
    rejects: list[tuple[int, ClipError]] = field(default_factory=list)
    error: Exception | None = None  # ends the run; returned and not raised, since the nodes would lose its type

    def pin_memory(self) -> Step:
        """Move the batches to pinned memory, one by one, and return the step; called by `PinMemory`."""
        for i, batch in enumerate(self.batches):
            self.batches[i] = batch.pin_memory()
        return self


@dataclass(slots=True)
class SlotResult:
    """The result of reading one slot."""

    plan: GlobalBatch
    clip: Clip | None = None
    draws: dict[str, Tensor] | None = None
    reject: tuple[int, ClipError] | None = None
    error: Exception | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the clip, its text states and its random numbers."""
        tensors = [*(self.draws or {}).values()]
        if self.clip is not None:
            tensors += [self.clip.video] if self.clip.text is None else [self.clip.video, self.clip.text]
        return sum(tensor.nbytes for tensor in tensors)


def read_ahead(
    dataset: ClipDataset,
    plans: Iterator[GlobalBatch],
    shares: Mapping[Bucket, RankShare],
    *,
    seed: int,
    rank: int,
    step: int,
    workers: int,
    prefetch: int,
    prefetch_bytes: int,
    pin_memory: bool,
    draw: Draw | None = None,
) -> Generator[Step, None, None]:
    """Yield this rank's part of each global batch; the threads end when the iterator is closed or dropped.

    Args:
        dataset: the data set to read.
        plans: the global batches, in order.
        shares: the rank's part of each bucket's global batch.
        seed: seed of every sample's randomness.
        rank: data-parallel rank.
        step: number of the first step.
        workers: number of threads that read clips.
        prefetch: number of steps to read ahead.
        prefetch_bytes: see `ClipLoader`.
        pin_memory: put videos in pinned memory.
        draw: see `ClipLoader`.
    """
    # The nodes' threads call torch.set_num_threads(1), which leaks into this thread unless it has called this before.
    torch.get_num_threads()
    # 0: the nodes take no snapshots, since the position follows from the number of steps yielded.
    ahead, reader = ByteBudget(prefetch_bytes), readers.Reader()

    def read(work: tuple[GlobalBatch, int]) -> SlotResult:
        with reader.at_work():
            return read_slot(dataset, seed, draw, ahead.measure, work)

    node: Any = IterableWrapper(_slots(plans, shares, rank, ahead))
    node = ParallelMapper(node, read, num_workers=workers, snapshot_frequency=0)
    node = Assemble(node, shares, step)
    if prefetch:
        node = Prefetcher(node, prefetch_factor=prefetch, snapshot_frequency=0)
    if pin_memory:
        node = PinMemory(node, snapshot_frequency=0)
    try:
        for result in node:
            ahead.hand_out()
            yield result
    finally:
        ahead.close()
        reader.set()


def read_slot(
    dataset: ClipDataset,
    seed: int,
    draw: Draw | None,
    measure: Callable[[Bucket, int], None],
    work: tuple[GlobalBatch, int],
) -> SlotResult:
    """Read one slot or, if it can't be read, the next readable one of the same global batch, cyclically.

    So the sample that stands in for an unreadable one depends on the global batch alone, not on ranks or workers.

    Args:
        dataset: the data set to read.
        seed: seed of every sample's randomness.
        draw: see `ClipLoader`; called for the slot's own sample, also where another one stands in for it.
        measure: called with the bucket and the bytes of what was read.
        work: a global batch and the position of the slot in it.
    """
    plan, place = work
    result = SlotResult(plan)
    try:
        result.draws = draw(plan.slots[place], plan.bucket) if draw is not None else None
        for offset in range(len(plan.slots)):
            slot = plan.slots[(place + offset) % len(plan.slots)]
            try:
                result.clip = dataset.load(slot.sample, seed=seed, epoch=slot.epoch)
                measure(plan.bucket, result.nbytes)
                return result
            except ClipError as error:
                result.reject = result.reject or (slot.sample, error)
        first = result.reject[1] if result.reject else ""
        result.error = DataError(
            f"none of the {len(plan.slots)} clips of a global batch can be read; the first: {first}"
        )
    except Exception as error:
        result.error = error
    return result


class Assemble(BaseNode[Step]):
    """A node that collects the slots of a step and stacks them into micro-batches."""

    def __init__(self, source: BaseNode[SlotResult], shares: Mapping[Bucket, RankShare], step: int) -> None:
        super().__init__()
        self.source, self.shares, self.step = source, shares, step

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Reset this node and its source."""
        super().reset(initial_state)
        self.source.reset()

    def get_state(self) -> dict[str, Any]:
        """Return no state: the loader keeps the position."""
        return {}

    def next(self) -> Step:
        """Return the next step of this rank."""
        reads = [next(self.source)]
        plan = reads[0].plan
        step, share = Step(plan), self.shares[plan.bucket]
        for _ in range(share.samples // share.micro):
            while len(reads) < share.micro:
                reads.append(next(self.source))
            self._add(step, reads)
            reads = []  # only stacked from here on
        self.step += 1
        return step

    def _add(self, step: Step, reads: list[SlotResult]) -> None:
        """Add a micro-batch to a step, unless there has been an error."""
        step.rejects += [read.reject for read in reads if read.reject]
        step.error = step.error or next((read.error for read in reads if read.error), None)
        if step.error is None:
            try:
                step.batches.append(_stack(step.plan, self.step, reads))
            except Exception as error:
                step.error = error


def _slots(
    plans: Iterator[GlobalBatch], shares: Mapping[Bucket, RankShare], rank: int, ahead: ByteBudget
) -> Iterator[tuple[GlobalBatch, int]]:
    for step, plan in enumerate(plans):
        samples = shares[plan.bucket].samples
        for place in range(rank * samples, (rank + 1) * samples):
            if not ahead.admit(step, plan.bucket):
                return
            yield plan, place


def _stack(plan: GlobalBatch, step: int, reads: list[SlotResult]) -> Batch:
    clips = [read.clip for read in reads if read.clip is not None]
    for clip in clips:
        if (clip.bucket or clip.video.shape[1:]) != plan.bucket:
            shape = "x".join(str(n) for n in clip.video.shape[1:])
            raise DataError(f"sample {clip.index}: loaded as {shape}; the data set's bucket for it is {plan.bucket}")
    drawn = [read.draws for read in reads if read.draws is not None]
    texts = [clip.text for clip in clips if clip.text is not None]
    return Batch(
        video=stack_videos([clip.video for clip in clips]),
        captions=[clip.caption for clip in clips],
        indices=[clip.index for clip in clips],
        fps=[clip.fps for clip in clips],
        bucket=plan.bucket,
        epoch=plan.epoch,
        step=step,
        repeats=sum(read.reject is not None for read in reads),
        texts=texts if len(texts) == len(clips) else None,
        starts=[clip.span[0] for clip in clips],
        draws={name: torch.stack([draws[name] for draws in drawn]) for name in drawn[0]} if drawn else None,
    )
