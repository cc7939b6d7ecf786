"""The loader: the same samples for any ranks, workers and micro-batches; resumes bit for bit; bad clips move none."""

from __future__ import annotations

import gc
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

from stdit_data.buckets import Bucket, batch_sizes
from stdit_data.clip import Clip, ClipDataset
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError
from stdit_data.loading.loader import Batch, ClipLoader
from stdit_data.loading.order import GlobalBatch, Slot
from stdit_data.loading.prefetch import Step
from stdit_data.storage import readers
from stdit_data.transforms import stack_videos, to_float

SMALL, WIDE = Bucket(2, 4, 4), Bucket(1, 4, 8)


class Numbers:
    """Clips that say what they were made from: index, seed and epoch are in the pixels."""

    def __init__(self, length: int, *, bad: Sequence[int] = (), mixed: bool = False, slow: bool = False) -> None:
        self.length, self.bad, self.mixed, self.slow = length, set(bad), mixed, slow

    def __len__(self) -> int:
        return self.length

    def bucket(self, index: int) -> Bucket:
        return WIDE if self.mixed and index % 3 == 0 else SMALL

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        if self.slow:
            time.sleep(random.random() * 0.004)  # so that threads finish out of order
        if index in self.bad:
            raise ClipError(f"clip{index}.mp4", "broken")
        video = torch.full((3, *self.bucket(index)), float(index))
        video[1], video[2] = float(seed), float(epoch)
        return Clip(video, f"caption {index}", index, fps=8.0)


def steps(loader: ClipLoader, count: int) -> list[list[Batch]]:
    taken = list(islice(loader, count))
    loader.close()
    return taken


def samples(step: list[Batch]) -> list[tuple[float, ...]]:
    """(index, seed, epoch) of each sample of a step, read from the pixels."""
    rows = [tuple(clip[:, 0, 0, 0].tolist()) for batch in step for clip in batch.video]
    assert [row[0] for row in rows] == [index for batch in step for index in batch.indices]
    assert [f"caption {int(row[0])}" for row in rows] == [caption for batch in step for caption in batch.captions]
    return rows


def whole(dataset: ClipDataset, count: int, *, world: int = 1, state: dict[str, int] | None = None, **settings_: Any):
    """The global batches of some steps, put together from all ranks; and the state after them."""
    ranks, after = [], []
    for rank in range(world):
        loader = ClipLoader(dataset, rank=rank, world_size=world, **settings_)
        if state is not None:
            loader.load_state_dict(state)
        ranks.append([samples(step) for step in steps(loader, count)])
        after.append(json.loads(json.dumps(loader.state_dict())))
    assert all(one == after[0] for one in after)
    return [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)], after[0]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(("workers", "prefetch", "micro"), [(0, 0, None), (0, 2, 1), (1, 1, 2), (4, 2, 3)])
def test_global_batches_do_not_depend_on_ranks_workers_or_micro_batches(
    world: int, workers: int, prefetch: int, micro: int | None
) -> None:
    dataset = Numbers(37, mixed=True, bad=[5, 6, 9], slow=workers > 1)
    common = {"global_batch": 8, "seed": 11, "max_reject_share": 1.0}
    expected, state = whole(dataset, 14, workers=0, prefetch=0, **common)
    got, after = whole(dataset, 14, world=world, workers=workers, prefetch=prefetch, micro_batch=micro, **common)
    assert got == expected
    assert after == state


@settings(deadline=None, max_examples=25)
@given(
    stop=st.integers(0, 20),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    workers=st.sampled_from([0, 3]),
    length=st.integers(1, 40),
    mixed=st.booleans(),
)
def test_resumes_bit_for_bit(stop: int, worlds: tuple[int, int], workers: int, length: int, mixed: bool) -> None:
    """Stopped after any step, in any epoch, and gone on with on other ranks: the same samples, drawn the same way."""
    dataset = Numbers(length, mixed=mixed, bad=[2] if length > 12 else [])
    common = {"global_batch": 4, "seed": 3, "max_reject_share": 1.0}
    unbroken, end = whole(dataset, 24, workers=0, prefetch=0, **common)
    before, state = whole(dataset, stop, world=worlds[0], workers=workers, **common)
    after, end_after = whole(dataset, 24 - stop, world=worlds[1], state=state, workers=workers, **common)
    assert before + after == unbroken
    assert end_after == end
    assert all(isinstance(value, int) for value in state.values())


def test_one_two_four_ranks() -> None:
    """A run that grows from one to two to four ranks is the run on one."""
    dataset = Numbers(30)
    unbroken, _ = whole(dataset, 18, global_batch=8, seed=0)
    grown, state = [], None
    for world in (1, 2, 4):
        part, state = whole(dataset, 6, world=world, global_batch=8, seed=0, state=state)
        grown += part
    assert grown == unbroken


def test_state_counts_what_was_yielded_not_what_was_read_ahead() -> None:
    loader = ClipLoader(Numbers(40), global_batch=4, seed=0, prefetch=4, workers=2)
    iterator = iter(loader)
    for step in range(5):
        assert loader.state_dict()["step"] == step
        (batch,) = next(iterator)
        assert batch.step == step
    loader.close()
    # The same loader goes on where it was.
    assert next(iter(loader))[0].step == 5
    loader.close()


def test_every_sample_once_per_epoch() -> None:
    loader = ClipLoader(Numbers(20), global_batch=5, seed=0)
    taken = steps(loader, 12)
    for epoch in range(3):
        of_epoch = [step for step in taken if step[0].epoch == epoch]
        assert sorted(index for step in of_epoch for batch in step for index in batch.indices) == list(range(20))


def test_a_bad_clip_repeats_a_good_one_of_its_global_batch_and_moves_nothing() -> None:
    good, _ = whole(Numbers(24), 12, global_batch=8, seed=7)
    bad = {3, 4, 20}
    loader = ClipLoader(Numbers(24, bad=sorted(bad)), global_batch=8, seed=7, max_reject_share=1.0)
    repeats = 0
    for step, sound in zip(steps(loader, 12), good, strict=True):
        got = samples(step)
        for place, (one, wanted) in enumerate(zip(got, sound, strict=True)):
            if int(wanted[0]) in bad:
                following = [sound[(place + offset) % 8] for offset in range(1, 8)]
                assert one == next(row for row in following if int(row[0]) not in bad)
                repeats += 1
            else:
                assert one == wanted
        assert sum(batch.repeats for batch in step) == sum(int(row[0]) in bad for row in sound)
    assert repeats == 3 * 4  # three bad ones in each of four epochs


def test_all_bad() -> None:
    loader = ClipLoader(Numbers(4, bad=range(4)), global_batch=2, seed=0, max_reject_share=1.0)
    with pytest.raises(
        DataError, match=r"none of the 2 clips of a global batch can be read; the first: clip\d.mp4: br"
    ):
        steps(loader, 1)


def test_too_many_rejects_stop_the_run(tmp_path: Path) -> None:
    log = tmp_path / "run" / "rejects.jsonl"
    loader = ClipLoader(Numbers(100, bad=range(20)), global_batch=10, seed=0, rejects=log, max_reject_share=0.1)
    words = (
        r"\d+ of \d+ clips can't be read, more than max_reject_share 0.1; the last: clip\d+.mp4: broken; they .*jsonl"
    )
    with pytest.raises(DataError, match=words):
        steps(loader, 30)
    assert 2 <= loader.state_dict()["step"] <= 10


@pytest.mark.parametrize("seed", range(20))
def test_the_share_is_exact_once_all_are_seen(seed: int) -> None:
    """20 of 100 bad: with 0.2 allowed no run stops, by chance, early or late; with 0.19 each does within an epoch."""
    dataset = Numbers(100, bad=range(20))
    allowed = ClipLoader(dataset, global_batch=10, seed=seed, max_reject_share=0.2, workers=0, prefetch=0)
    assert len(steps(allowed, 25)) == 25
    loader = ClipLoader(dataset, global_batch=10, seed=seed, max_reject_share=0.19, workers=0, prefetch=0)
    with pytest.raises(DataError, match=r"\d+ of \d+ clips can't be read"):
        steps(loader, 20)
    assert loader.state_dict()["step"] < 20


def test_one_bad_clip_at_the_start_does_not_stop_a_run() -> None:
    dataset = Numbers(1000)
    first = steps(ClipLoader(dataset, global_batch=4, seed=0), 1)[0][0].indices[0]
    dataset.bad = {first}
    assert len(steps(ClipLoader(dataset, global_batch=4, seed=0, max_reject_share=0.001), 400)) == 400
    with pytest.raises(DataError, match="1 of 4 clips can't be read, more than max_reject_share 0"):
        steps(ClipLoader(dataset, global_batch=4, seed=0, max_reject_share=0.0), 1)


def test_rejects_file(tmp_path: Path) -> None:
    """Each bad clip once, over epochs and over a stop; a line cut short is no obstacle."""
    log = tmp_path / "rejects.jsonl"
    dataset = Numbers(12, bad=[1, 7])
    common = {"global_batch": 4, "seed": 0, "rejects": log, "max_reject_share": 1.0}
    loader = ClipLoader(dataset, **common)
    steps(loader, 7)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["path"] for row in rows} == {"clip1.mp4", "clip7.mp4"}
    assert len(rows) == 2
    assert all(row["reason"] == "broken" and row["epoch"] == 0 and 0 <= row["step"] < 3 for row in rows)
    with log.open("a") as file:
        file.write('{"path": "cl')
    again = ClipLoader(dataset, **common)
    again.load_state_dict(loader.state_dict())
    steps(again, 7)
    assert len(log.read_text().splitlines()) == 3
    for rank in range(2):
        steps(ClipLoader(dataset, rank=rank, world_size=2, **common), 6)
    beside = [json.loads(line) for line in (tmp_path / "rejects.rank1.jsonl").read_text().splitlines()]
    assert {row["path"] for row in beside} <= {"clip1.mp4", "clip7.mp4"}


def test_other_errors_come_through_as_they_are() -> None:
    class Broken(Numbers):
        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            raise KeyError("a bug, not a bad clip")

    for workers in (0, 2):
        with pytest.raises(KeyError, match="a bug, not a bad clip"):
            steps(ClipLoader(Broken(8), global_batch=2, seed=0, workers=workers), 1)


def test_a_dataset_that_breaks_its_word() -> None:
    class Liar(Numbers):
        def bucket(self, index: int) -> Bucket:
            return Bucket(2, 8, 8)

        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            return Clip(torch.zeros(3, 2, 4, 4), "", index, 8.0)

    with pytest.raises(DataError, match=r"sample \d: loaded as 2x4x4; the data set's bucket for it is 2x8x8"):
        steps(ClipLoader(Liar(8), global_batch=2, seed=0), 1)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_threads_end(workers: int, prefetch: int) -> None:
    """When closed, when dropped, and after an error; and the thread count of torch stays."""
    torch_threads, before = torch.get_num_threads(), threading.active_count()

    def settled() -> bool:
        for _ in range(100):
            if threading.active_count() <= before:
                return True
            time.sleep(0.05)
        return False

    common = {"global_batch": 4, "seed": 0, "workers": workers, "prefetch": prefetch}
    loader = ClipLoader(Numbers(50), **common)
    next(iter(loader))
    loader.close()
    assert settled()
    gc.disable()  # dropping is enough
    dropped: Iterator[Any] | None = iter(ClipLoader(Numbers(50), **common))
    next(dropped)
    del dropped
    for _ in loader:
        break
    assert settled()
    gc.enable()
    with pytest.raises(DataError) as caught:
        steps(ClipLoader(Numbers(4, bad=range(4)), **common), 1)
    assert settled()
    assert caught.traceback
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (3, 2)])
def test_a_loader_goes_on_after_the_waiting_for_stores_has_ended(workers: int, prefetch: int) -> None:
    """The step that is being read when Ctrl-C comes is read to its end, and so are those after it."""

    class Interrupted(Numbers):
        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            readers.release()
            return super().load(index, seed=seed, epoch=epoch)

    common = {"global_batch": 4, "seed": 0, "workers": workers, "prefetch": prefetch}
    assert whole(Interrupted(20), 12, **common) == whole(Numbers(20), 12, **common)


@pytest.mark.parametrize(("workers", "limit", "ahead"), [(3, 6, 6), (3, 0, 4), (3, 3, 4), (0, 6, 6), (3, 1000, None)])
def test_reading_ahead_stays_within_its_bytes(workers: int, limit: int, ahead: int | None) -> None:
    """Of clips that were not handed out, as many as fit are read, or the next step's if these are more."""
    size = 3 * 2 * 4 * 4 * 4

    class Counting(Numbers):
        loaded = 0

        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            self.loaded += 1
            return super().load(index, seed=seed, epoch=epoch)

    def settled(dataset: Counting) -> int:
        count = -1
        while count != dataset.loaded:
            count = dataset.loaded
            time.sleep(0.3)
        return count

    dataset = Counting(100)
    loader = ClipLoader(dataset, global_batch=4, seed=0, workers=workers, prefetch=8, prefetch_bytes=limit * size)
    iterator = iter(loader)
    for step in range(1, 4):
        next(iterator)
        found = settled(dataset) - 4 * step
        assert found == ahead if ahead is not None else found > 20
    loader.close()


def test_pixels_that_are_left_as_uint8(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    """A quarter of the bytes, and the same numbers; beside a clip of float32, such as HDR, too."""
    for number in range(4):
        path = encode_clip(tmp_path / f"{number}.mp4", frames=12)
        path.with_suffix(".txt").write_text(f"clip {number}")
    plain, small = (open_videos(tmp_path, frames=4, height=32, width=32, uint8=uint8) for uint8 in (False, True))
    common: dict[str, Any] = {"global_batch": 4, "seed": 0, "micro_batch": 2}
    for one, other in zip(*(steps(ClipLoader(d, **common), 2)[1] for d in (plain, small)), strict=True):
        assert (one.video.dtype, other.video.dtype) == (torch.float32, torch.uint8)
        assert torch.equal(one.video, to_float(other.video))
        mixed = stack_videos([other.video[0], one.video[1]])
        assert torch.equal(mixed, one.video)


def test_two_loaders_at_once() -> None:
    one, two = (ClipLoader(Numbers(20), global_batch=4, seed=0) for _ in range(2))
    for a, b in islice(zip(one, two, strict=True), 10):
        assert samples(a) == samples(b)
    one.close()
    two.close()


def test_micro_batches() -> None:
    dataset = Numbers(48)
    for micro, sizes in ((None, [12]), (12, [12]), (5, [4, 4, 4]), (4, [4, 4, 4]), (1, [1] * 12)):
        loader = ClipLoader(dataset, global_batch=24, world_size=2, seed=0, micro_batch=micro)
        assert loader.accumulation == len(sizes)
        (step,) = steps(loader, 1)
        assert [len(batch.video) for batch in step] == sizes


def test_buckets_have_their_own_sizes() -> None:
    """A token budget gives each bucket its global batch; a global batch is of one bucket."""
    dataset = Numbers(60, mixed=True)
    sizes = batch_sizes([SMALL, WIDE], 16, multiple_of=2, stride=(1, 4, 4))
    assert sizes == {SMALL: 8, WIDE: 8}
    sizes = batch_sizes([SMALL, WIDE], 200, multiple_of=2, stride=(1, 2, 2))
    assert sizes == {SMALL: 24, WIDE: 24}
    sizes = {SMALL: 8, WIDE: 4}
    loaders = [
        ClipLoader(dataset, global_batch=sizes, seed=0, rank=r, world_size=2, micro_batch={SMALL: 2}) for r in (0, 1)
    ]
    for mine, other in zip(*(steps(loader, 20) for loader in loaders), strict=True):
        bucket = mine[0].bucket
        assert len(mine) == (2 if bucket == SMALL else 1)
        for batch in (*mine, *other):
            assert batch.bucket == bucket
            assert batch.video.shape[2:] == bucket
        assert sum(len(batch.video) for batch in (*mine, *other)) == sizes[bucket]


def test_weights_of_a_dataset_count() -> None:
    dataset = Numbers(4)
    dataset.weights = [2.0, 1.0, 1.0, 0.0]  # type: ignore[attr-defined]
    taken = steps(ClipLoader(dataset, global_batch=4, seed=0), 10)
    indices = [index for step in taken for batch in step for index in batch.indices]
    assert [indices.count(i) for i in range(4)] == [20, 10, 10, 0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"global_batch": 6, "world_size": 4},
            "global_batch 6 .* can't be divided among 4 ranks; expected a multiple of 4",
        ),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2: expected a rank from 0 to 1"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"workers": -1}, "workers -1"),
        ({"prefetch_bytes": -1}, "prefetch_bytes -1"),
        ({"max_reject_share": 1.5}, "max_reject_share 1.5"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ClipLoader(Numbers(8), **{"global_batch": 4, "seed": 0, **values})


def test_a_state_of_another_run_is_refused() -> None:
    state = ClipLoader(Numbers(8), global_batch=4, seed=0).state_dict()
    for dataset, values, words in (
        (Numbers(8), {"seed": 1}, "seed is 0 in the state and 1 here"),
        (Numbers(9), {}, "samples is 8 in the state and 9 here"),
        (
            Numbers(8),
            {"global_batch": 2},
            "fingerprint is .* .the global batch, the buckets or the weights have changed",
        ),
        (Numbers(8, mixed=True), {}, "fingerprint is"),
    ):
        with pytest.raises(DataError, match=words):
            ClipLoader(dataset, **{"global_batch": 4, "seed": 0, **values}).load_state_dict(state)
    with pytest.raises(DataError, match="batch, epoch missing"):
        loader = ClipLoader(Numbers(8), global_batch=4, seed=0)
        loader.load_state_dict({key: value for key, value in state.items() if key not in ("epoch", "batch")})


def test_a_dataset_may_say_which_clips_it_means() -> None:
    dataset = Numbers(8)
    plain = ClipLoader(dataset, global_batch=4, seed=0).state_dict()
    assert "clips" not in plain
    dataset.identity = 5  # type: ignore[attr-defined]
    state = ClipLoader(dataset, global_batch=4, seed=0).state_dict()
    assert state == {**plain, "clips": 5}
    ClipLoader(dataset, global_batch=4, seed=0).load_state_dict(state)
    for identity, words in (
        (6, "clips is 5 in the state and 6 here .the data set lists other clips"),
        (None, "5 in the state and None"),
    ):
        dataset.identity = identity  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=words):
            ClipLoader(dataset, global_batch=4, seed=0).load_state_dict(state)


def test_torchdata_finds_our_way_to_pin() -> None:
    """What its PinMemory node calls pins each micro-batch's video (here a stand-in, since pinning needs CUDA)."""

    class Video:
        def pin_memory(self) -> str:
            return "pinned"

    batch = Batch(Video(), ["a"], [0], [8.0], SMALL, epoch=0, step=0, repeats=0)  # type: ignore[arg-type]
    plan = GlobalBatch(epoch=0, batch=0, bucket=SMALL, slots=(Slot(0, 0),))
    pinned = pin_memory(Step(plan, batches=[batch, batch]))
    assert [one.video for one in pinned.batches] == ["pinned", "pinned"]
    assert pinned.plan is plan


def test_pinning_without_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(DataError, match="pin_memory: needs CUDA"):
        ClipLoader(Numbers(8), global_batch=4, seed=0, pin_memory=True)


@pytest.mark.gpu
def test_pinned_memory() -> None:
    (step,) = steps(ClipLoader(Numbers(8), global_batch=4, seed=0, pin_memory=True, micro_batch=2), 1)
    assert all(batch.video.is_pinned() for batch in step)
    (plain,) = steps(ClipLoader(Numbers(8), global_batch=4, seed=0, micro_batch=2), 1)
    assert samples(step) == samples(plain)
