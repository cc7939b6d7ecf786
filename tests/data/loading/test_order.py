"""The order: pure, every sample once per epoch, independent of everything but seed, epoch and batch size."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.buckets import Bucket
from stdit_data.errors import DataError
from stdit_data.loading.order import GlobalBatch, Order

A, B, C = Bucket(16, 64, 64), Bucket(1, 64, 64), Bucket(8, 32, 96)
mixes = st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=60)
sizes = st.fixed_dictionaries({A: st.integers(1, 12), B: st.integers(1, 12), C: st.integers(1, 12)})


def first(order: Order, count: int, epoch: int = 0, batch: int = 0) -> list[GlobalBatch]:
    return list(islice(order.from_cursor(epoch, batch), count))


@settings(deadline=None)
@given(mix=mixes, size=sizes, seed=st.integers(0, 2**63), shuffle=st.booleans())
def test_each_sample_once_per_epoch(mix: list[Bucket], size: dict[Bucket, int], seed: int, shuffle: bool) -> None:
    """Over whole epochs every (sample, epoch) comes exactly once; what is left at the end is less than a batch per
    bucket, and comes first in the next epoch."""
    order = Order(mix, global_batch=size, seed=seed, shuffle=shuffle)
    epochs = 4
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(epochs):
        for number in range(order.batches(epoch)):
            batch = order.batch(epoch, number)
            assert len(batch.slots) == size[batch.bucket]
            assert batch.slots[-1].epoch == epoch == batch.epoch
            assert {mix[slot.sample] for slot in batch.slots} == {batch.bucket}
            seen.update((slot.sample, slot.epoch) for slot in batch.slots)
    assert set(seen.values()) <= {1}
    waiting = {(sample, epoch) for sample in range(len(mix)) for epoch in range(epochs)} - seen.keys()
    for bucket in (A, B, C):
        left = [pair for pair in waiting if mix[pair[0]] == bucket]
        assert len(left) < size[bucket]
        # Only the last epoch is incomplete, unless a bucket has fewer samples than its batch.
        if mix.count(bucket) >= size[bucket]:
            assert {epoch for _, epoch in left} <= {epochs - 1}


@settings(deadline=None)
@given(mix=mixes, size=sizes, seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_any_batch_can_be_asked_for_alone(mix: list[Bucket], size: dict[Bucket, int], seed: int, epoch: int) -> None:
    """A fresh order asked for one batch gives what an order that went through all of them gives."""
    walked = first(Order(mix, global_batch=size, seed=seed), 40)
    for batch in walked[:: max(1, len(walked) // 7)]:
        assert Order(mix, global_batch=size, seed=seed).batch(batch.epoch, batch.batch) == batch
    at = walked[20]
    assert first(Order(mix, global_batch=size, seed=seed), 20, at.epoch, at.batch) == walked[20:]


def test_epochs_and_seeds_differ() -> None:
    mix = [A] * 50
    order = Order(mix, global_batch=50, seed=3)
    runs = [tuple(slot.sample for slot in order.batch(epoch, 0).slots) for epoch in range(3)]
    other = tuple(slot.sample for slot in Order(mix, global_batch=50, seed=4).batch(0, 0).slots)
    assert len({*runs, other}) == 4
    assert all(sorted(run) == list(range(50)) for run in runs)


def test_the_order_is_the_same_for_ever() -> None:
    """A run resumed years later, on other versions of numpy, goes on in the same order."""
    order = Order([A, A, B, A, B, A, A, A, B, A], global_batch=2, seed=1234)
    batches = [[(slot.sample, slot.epoch) for slot in batch.slots] for batch in first(order, 6)]
    assert batches == GOLDEN


GOLDEN = [
    [(7, 0), (0, 0)],
    [(8, 0), (4, 0)],
    [(5, 0), (6, 0)],
    [(9, 0), (1, 0)],
    [(6, 1), (5, 1)],
    [(1, 1), (7, 1)],
]


def test_without_shuffling_samples_keep_their_order() -> None:
    order = Order([A] * 5, global_batch=2, seed=0, shuffle=False)
    assert [slot.sample for batch in first(order, 5) for slot in batch.slots] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_more_slots_than_samples() -> None:
    """A batch larger than the set spans epochs and still sees every sample equally often."""
    order = Order([A] * 3, global_batch=8, seed=0)
    counts = Counter(slot.sample for batch in first(order, 3) for slot in batch.slots)
    assert set(counts.values()) == {8}
    assert order.batches(0) == 0


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(0, 3), min_size=1, max_size=20).filter(lambda w: max(w) >= 0.01),
    size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_weights(weights: list[float], size: int, seed: int) -> None:
    """After E epochs a sample of weight w was seen w x E times, to one less or more and what a batch holds back."""
    order = Order([A] * len(weights), global_batch=size, seed=seed, weights=weights)
    epochs = 40
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        for number in range(order.batches(epoch)):
            batch = order.batch(epoch, number)
            per_epoch = Counter(batch.slots)
            assert all(count <= np.ceil(weights[slot.sample] + 1e-3) for slot, count in per_epoch.items())
            seen.update(slot.sample for slot in batch.slots)
    for sample, weight in enumerate(weights):
        assert abs(seen[sample] - round(weight, 3) * epochs) <= 1 + size


def test_buckets_are_mixed_over_the_epoch() -> None:
    order = Order([A] * 500 + [B] * 500, global_batch=5, seed=0)
    kinds = [batch.bucket for batch in first(order, 200)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert 70 < changes < 130  # 99.5 expected of a random mix, 1 of none


def test_starts_are_uniform() -> None:
    """Each sample is equally likely in each place: chi-squared over 2,000 epochs of 8 samples."""
    order = Order([A] * 8, global_batch=8, seed=5)
    table = np.zeros((8, 8))
    for epoch in range(2000):
        for place, slot in enumerate(order.batch(epoch, 0).slots):
            table[place, slot.sample] += 1
    assert ((table - 250) ** 2 / 250).sum() < 85  # 49 degrees of freedom; the 0.1 % point is 85.4


def test_fingerprint_tells_orders_apart() -> None:
    base = Order([A, B, A], global_batch=2, seed=0).fingerprint()
    assert base == Order([A, B, A], global_batch=2, seed=0).fingerprint()
    others = [
        Order([A, A, B], global_batch=2, seed=0),
        Order([A, B, A], global_batch=1, seed=0),
        Order([A, B, A], global_batch=2, seed=0, shuffle=False),
        Order([A, B, A], global_batch=2, seed=0, weights=[1, 1, 2]),
    ]
    assert len({base, *(order.fingerprint() for order in others)}) == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"buckets": []}, "no samples"),
        ({"seed": -1}, "seed -1"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"global_batch": {B: 3}}, "no size for bucket 16x64x64 .given: 1x64x64."),
        ({"weights": [1.0]}, "1 for 3 samples"),
        ({"weights": [1.0, -1.0, 1.0]}, "weight -1.0 of sample 1"),
        ({"weights": [1.0, 1.0, float("nan")]}, "weight nan of sample 2"),
        ({"weights": [0.0, 0.0, 0.0]}, "all are 0"),
    ],
)
def test_settings_that_make_no_sense(values: dict, words: str) -> None:
    arguments = {"buckets": [A, A, A], "global_batch": 2, "seed": 0, **values}
    with pytest.raises(DataError, match=words):
        Order(arguments.pop("buckets"), **arguments)
