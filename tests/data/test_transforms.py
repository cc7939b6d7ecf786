"""Resize, crop, flip, range; buckets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from stdit_data.buckets import Bucket, batch_sizes, choose_bucket, parse_bucket
from stdit_data.errors import DataError
from stdit_data.transforms import MOST_ASPECT, Fit, may_flip, normalise, to_uint8


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (37, 53), (256, 256)])
def test_resize_is_pillows(size: tuple[int, int]) -> None:
    """Antialiased bicubic, as Pillow does it, to a rounding."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    fit = Fit(32, 32)
    height, width = fit.scaled(*size)
    assert min(height, width) == 32
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    got = fit(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected[top : top + 32, left : left + 32]).max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    source=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    target=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    aspect=st.sampled_from([1.0, 2.0, 0.9]),
    flip=st.booleans(),
)
def test_fit_gives_the_size_asked_for(source, target, at, aspect, flip) -> None:
    assume(1 / MOST_ASPECT <= source[1] * aspect / source[0] <= MOST_ASPECT)  # longer ones are refused
    fit = Fit(*target, x=at[0], y=at[1], flip=flip, aspect=aspect)
    picture = torch.zeros(3, *source, dtype=torch.uint8)
    assert fit(picture).shape == (3, *target)
    height, width = fit.scaled(*source)
    assert height == target[0] or width == target[1]  # no more is cut away than must be
    assert height >= target[0]
    assert width >= target[1]


def test_shrinking_to_one_pixel() -> None:
    """Whatever the picture's memory layout; torch fails here for planar uint8."""
    for layout in (torch.contiguous_format, torch.channels_last):
        picture = torch.full((1, 3, 2, 7), 9, dtype=torch.uint8).contiguous(memory_format=layout)[0]
        assert Fit(1, 1)(picture).flatten().tolist() == [9, 9, 9]


def test_crops_and_flips() -> None:
    picture = torch.arange(4 * 8).reshape(1, 4, 8).to(torch.uint8).repeat(3, 1, 1)
    assert torch.equal(Fit(4, 4)(picture), picture[:, :, 2:6])
    assert torch.equal(Fit(4, 4, x=0.0)(picture), picture[:, :, :4])
    assert torch.equal(Fit(4, 4, x=1.0, flip=True)(picture), picture[:, :, 4:].flip(-1))
    tall = picture.transpose(1, 2)
    assert torch.equal(Fit(4, 4, y=1.0)(tall), tall[:, 4:])


def test_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = normalise(values)
    assert unit.dtype == torch.float32
    assert (float(unit[0]), float(unit[255])) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), values)
    assert torch.equal(normalise(torch.tensor([-0.5, 0.0, 0.5, 2.0])), torch.tensor([-1.0, -1.0, 0.0, 1.0]))
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("caption", "may"),
    [
        ("A dog runs over a lawn", True),
        ("A car turns left", False),
        ("The RIGHT hand waves", False),
        ("They move leftwards.", False),
        ("a left-handed player", False),
        ("a copyright notice; bright light; the cleft", True),
        ("the wheel turns counterclockwise", False),
        ("sunset in the west", False),
        ("", True),
    ],
)
def test_captions_that_forbid_mirroring(caption: str, may: bool) -> None:
    assert may_flip(caption) is may


def test_bucket_text() -> None:
    assert parse_bucket("16x256x512") == Bucket(16, 256, 512)
    assert parse_bucket(str(Bucket(1, 2, 3))) == Bucket(1, 2, 3)
    for text in ("16x256", "axbxc", "16x0x256", "-1x2x3", "1x2x3x4", ""):
        with pytest.raises(DataError, match="expected FRAMESxHEIGHTxWIDTH"):
            parse_bucket(text)


BUCKETS = [Bucket(*b) for b in [(16, 256, 256), (16, 192, 320), (16, 320, 192), (64, 256, 256), (1, 512, 512)]]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((200, 1080, 1920), (64, 256, 256)),  # length first: it is the scarcer
        ((40, 1080, 1920), (16, 192, 320)),
        ((40, 1920, 1080), (16, 320, 192)),
        ((16, 500, 500), (16, 256, 256)),
        ((1, 100, 900), (1, 512, 512)),
        ((0, 100, 900), (1, 512, 512)),  # too short for all: the shortest
    ],
)
def test_choice_of_bucket(clip: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert choose_bucket(BUCKETS, *clip) == expected
    assert choose_bucket(BUCKETS[::-1], *clip) == expected


def test_among_equal_shapes_the_largest_without_enlarging() -> None:
    sizes = [Bucket(16, s, s) for s in (128, 256, 512)]
    assert choose_bucket(sizes, 16, 300, 300).height == 256
    assert choose_bucket(sizes, 16, 2000, 3000).height == 512
    assert choose_bucket(sizes, 16, 64, 64).height == 128


@settings(deadline=None)
@given(
    buckets=st.lists(
        st.tuples(st.integers(1, 64), st.integers(16, 512), st.integers(16, 512)).map(lambda b: Bucket(*b)),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    ranks=st.integers(1, 8),
    budget=st.integers(1, 200_000),
)
def test_token_budget(buckets: list[Bucket], ranks: int, budget: int) -> None:
    """As many clips as fit, in a multiple of the ranks; an error where none do."""
    tokens = {
        bucket: bucket.frames * math.ceil(bucket.height / 16) * math.ceil(bucket.width / 16) for bucket in buckets
    }
    if any(count * ranks > budget for count in tokens.values()):
        with pytest.raises(DataError, match=f"token budget {budget}: bucket .* needs"):
            batch_sizes(buckets, budget, multiple_of=ranks)
        return
    for bucket, size in batch_sizes(buckets, budget, multiple_of=ranks).items():
        assert size % ranks == 0
        assert size * tokens[bucket] <= budget < (size + ranks) * tokens[bucket]
