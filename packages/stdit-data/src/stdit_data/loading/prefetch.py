"""Reads ahead: the torchdata.nodes graph under the loader. It maps and prefetches; it holds no order of its own.

    slots of this rank, in order -> read each (threads, results in order) -> stack into micro-batches -> prefetch -> pin

b samples of a micro-batch, C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, PinMemory, Prefetcher

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.loading.order import GlobalBatch


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch."""

    video: Tensor  # [b, C, T, H, W] float32 in [-1, 1]; moments of latents from a cache
    captions: list[str]
    indices: list[int]  # the samples really in it: a bad slot shows the one it repeats
    fps: list[float]  # frames a second as sampled
    bucket: Bucket
    epoch: int
    step: int  # optimiser steps before this one, since the run began
    repeats: int  # slots of this micro-batch that repeat another sample because their own can't be read
    texts: list[Tensor] | None = None  # [L, D] each, without padding, where the dataset has cached them
    starts: list[float] | None = None  # seconds from the first frame of each clip's video to the clip's

    def pin_memory(self) -> Batch:
        """The same with `video` in pinned memory."""
        return replace(self, video=self.video.pin_memory())


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank takes of a bucket's global batch."""

    samples: int
    micro: int  # samples per micro-batch; divides `samples`


@dataclass(slots=True)
class Step:
    """One optimiser step's micro-batches on this rank, with what was met on the way."""

    plan: GlobalBatch
    batches: list[Batch] = field(default_factory=list)
    rejects: list[tuple[int, ClipError]] = field(default_factory=list)
    fault: Exception | None = None  # what ends the run; a value, since the nodes would lose its type on the way

    def pin_memory(self) -> Step:
        """Called by the nodes, by this name."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(slots=True)
class Read:
    """What a worker made of one slot."""

    plan: GlobalBatch
    clip: Clip | None = None
    reject: tuple[int, ClipError] | None = None
    fault: Exception | None = None


def read_ahead(
    dataset: ClipDataset,
    plans: Iterator[GlobalBatch],
    shares: Mapping[Bucket, Share],
    *,
    seed: int,
    rank: int,
    step: int,
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Generator[Step, None, None]:
    """This rank's part of one global batch after another; the threads end when the iterator is closed or dropped."""
    # The nodes' threads call torch.set_num_threads(1), which leaks into this thread unless it has asked before.
    torch.get_num_threads()
    # 0: the nodes take no snapshots of themselves, since a position follows from the steps yielded alone.
    node: Any = IterableWrapper(_slots(plans, shares, rank))
    node = ParallelMapper(node, partial(read_slot, dataset, seed), num_workers=workers, snapshot_frequency=0)
    node = Assemble(node, shares, step)
    if prefetch:
        node = Prefetcher(node, prefetch_factor=prefetch, snapshot_frequency=0)
    if pin_memory:
        node = PinMemory(node, snapshot_frequency=0)
    yield from node


def read_slot(dataset: ClipDataset, seed: int, work: tuple[GlobalBatch, int]) -> Read:
    """Reads one slot or, where it is bad, the next readable one after it in the same global batch (the first follows
    the last). So what stands in for a bad clip depends on the global batch alone, not on ranks, workers or luck.
    """
    plan, place = work
    done = Read(plan)
    try:
        for offset in range(len(plan.slots)):
            slot = plan.slots[(place + offset) % len(plan.slots)]
            try:
                done.clip = dataset.load(slot.sample, seed=seed, epoch=slot.epoch)
                return done
            except ClipError as error:
                done.reject = done.reject or (slot.sample, error)
        first = done.reject[1] if done.reject else ""
        done.fault = DataError(f"none of the {len(plan.slots)} clips of a global batch can be read; the first: {first}")
    except Exception as error:
        done.fault = error
    return done


class Assemble(BaseNode[Step]):
    """Collects the slots of a step and stacks them into micro-batches."""

    def __init__(self, source: BaseNode[Read], shares: Mapping[Bucket, Share], step: int) -> None:
        super().__init__()
        self.source, self.shares, self.step = source, shares, step

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset()

    def get_state(self) -> dict[str, Any]:
        return {}

    def next(self) -> Step:
        first = next(self.source)
        share = self.shares[first.plan.bucket]
        reads = [first] + [next(self.source) for _ in range(share.samples - 1)]
        done = Step(first.plan, rejects=[read.reject for read in reads if read.reject])
        done.fault = next((read.fault for read in reads if read.fault), None)
        if done.fault is None:
            try:
                parts = [reads[i : i + share.micro] for i in range(0, share.samples, share.micro)]
                done.batches = [_stack(first.plan, self.step, part) for part in parts]
            except Exception as error:
                done.fault = error
        self.step += 1
        return done


def _slots(
    plans: Iterator[GlobalBatch], shares: Mapping[Bucket, Share], rank: int
) -> Iterator[tuple[GlobalBatch, int]]:
    for plan in plans:
        samples = shares[plan.bucket].samples
        for place in range(rank * samples, (rank + 1) * samples):
            yield plan, place


def _stack(plan: GlobalBatch, step: int, reads: list[Read]) -> Batch:
    clips = [read.clip for read in reads if read.clip is not None]
    for clip in clips:
        if (clip.bucket or clip.video.shape[1:]) != plan.bucket:
            shape = "x".join(str(n) for n in clip.video.shape[1:])
            raise DataError(f"sample {clip.index}: the dataset gave {shape} and had announced bucket {plan.bucket}")
    texts = [clip.text for clip in clips if clip.text is not None]
    return Batch(
        video=torch.stack([clip.video for clip in clips]),
        captions=[clip.caption for clip in clips],
        indices=[clip.index for clip in clips],
        fps=[clip.fps for clip in clips],
        bucket=plan.bucket,
        epoch=plan.epoch,
        step=step,
        repeats=sum(read.reject is not None for read in reads),
        texts=texts if len(texts) == len(clips) else None,
        starts=[clip.span[0] for clip in clips],
    )
