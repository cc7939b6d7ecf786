"""The two-level shuffle: shards at random, then a window that slides over them."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.buckets import Bucket
from stdit_data.errors import DataError
from stdit_data.latents.order import WindowedOrder, shard_order
from stdit_data.loading.order import Order

A, B = Bucket(4, 8, 8), Bucket(1, 8, 8)


def windowed(count: int, per_shard: int, window: int, batch: int, *, seed: int = 0, mixed: bool = False, **more):
    shards = np.arange(count) // per_shard
    buckets = [A if i % 3 or not mixed else B for i in range(count)]
    return WindowedOrder(
        buckets, shards=lambda epoch: shards, window=window, global_batch=batch, seed=seed, **more
    ), Order(buckets, global_batch=batch, seed=seed, **more)


@given(
    count=st.integers(1, 200),
    per_shard=st.integers(1, 30),
    batch=st.integers(1, 9),
    seed=st.integers(0, 5),
    mixed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_window_of_all_shards_is_the_clip_loaders_order(
    count: int, per_shard: int, batch: int, seed: int, mixed: bool
) -> None:
    mine, clips = windowed(count, per_shard, count, batch, seed=seed, mixed=mixed)
    assert list(islice(mine.from_cursor(0, 0), 60)) == list(islice(clips.from_cursor(0, 0), 60))
    assert mine.fingerprint() == clips.fingerprint()


@given(
    count=st.integers(20, 200),
    per_shard=st.integers(1, 12),
    window=st.integers(1, 5),
    batch=st.integers(1, 9),
    mixed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_sample_is_seen_once_an_epoch(count: int, per_shard: int, window: int, batch: int, mixed: bool) -> None:
    order, _ = windowed(count, per_shard, window, batch, mixed=mixed)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in order.from_cursor(0, 0):
        if step.epoch > 3:
            break
        assert len({(slot.sample, slot.epoch) for slot in step.slots}) == batch
        for slot in step.slots:
            if slot.epoch in seen:
                seen[slot.epoch].append(slot.sample)
    assert all(sorted(samples) == list(range(count)) for samples in seen.values())


def test_only_a_window_of_shards_is_in_use() -> None:
    order, _ = windowed(3000, 10, 8, 20)
    position = {shard: place for place, shard in enumerate(shard_order(0, 0, list(range(300))))}
    reached, mixing = 0, []
    for batch in range(order.batches(0)):
        places = [position[slot.sample // 10] for slot in order.batch(0, batch).slots]
        assert min(places) >= reached - 8 - 1
        reached = max(reached, *places)
        mixing.append(len(set(places)))
    assert reached == 299
    assert np.mean(mixing) > 7  # of 20 samples, out of 80 to 90 that are in reach


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order, _ = windowed(300, 5, 4, 10)
    again, _ = windowed(300, 5, 4, 10)
    other, _ = windowed(300, 5, 4, 10, seed=1)
    assert order.batch(0, 3) == again.batch(0, 3)
    first = [slot.sample for n in range(30) for slot in order.batch(0, n).slots]
    assert first != [slot.sample for n in range(30) for slot in order.batch(1, n).slots]
    assert first != [slot.sample for n in range(30) for slot in other.batch(0, n).slots]
    assert order.fingerprint() != windowed(300, 5, 5, 10)[0].fingerprint()


def test_resuming_anywhere_goes_on_alike() -> None:
    order, _ = windowed(101, 5, 4, 7, mixed=True)
    whole = list(islice(order.from_cursor(0, 0), 40))
    for start in (0, 5, 13, 14, 27):
        fresh, _ = windowed(101, 5, 4, 7, mixed=True)
        step = whole[start]
        assert list(islice(fresh.from_cursor(step.epoch, step.batch), 40 - start)) == whole[start:]


def test_weights_and_no_shuffle() -> None:
    order, plain = windowed(60, 5, 3, 6, weights=[2.0] * 30 + [1.0] * 30)
    samples = [slot.sample for n in range(order.batches(0)) for slot in order.batch(0, n).slots]
    assert sorted(samples) == sorted([*range(60), *range(30)])
    order, plain = windowed(60, 5, 3, 6, shuffle=False)
    assert list(islice(order.from_cursor(0, 0), 20)) == list(islice(plain.from_cursor(0, 0), 20))


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="window 0: expected at least 1 shard"):
        windowed(10, 2, 0, 2)
