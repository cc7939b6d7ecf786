"""Outlines of clips whose truth is known, and of the same clips made worse."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_data.datasets.shapes import SHAPES, Scene, Triple, render
from stdit_train.evaluation.outline import OutlineQuality, measure_outline


def clip(shape: str, motion: str = "down right", radius: float = 0.19, frames: int = 8) -> Tensor:
    """[3, T, 64, 64], across an edge."""
    return render(Scene(Triple("cyan", shape, motion), "", 0.83, 0.41, radius, 0.027), frames, 64, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_true_clips_have_the_ideal_outline(shape: str) -> None:
    found = measure_outline(clip(shape), shape)
    assert found.overlap.shape == (8,) and found.overlap.min() > 0.995
    assert found.change is not None and found.change < 0.006


@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_overlaps_less(shape: str) -> None:
    others = [measure_outline(clip(other), shape).overlap.max() for other in SHAPES if other != shape]
    assert max(others) < 0.85


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_costs_overlap(shape: str) -> None:
    blurred = F.avg_pool2d(F.pad(clip(shape).transpose(0, 1), (2, 2, 2, 2), "circular"), 5, 1).transpose(0, 1)
    assert measure_outline(blurred, shape).overlap.max() < 0.9


def test_a_size_that_changes_changes_the_outline() -> None:
    large, small = clip("circle", "still"), clip("circle", "still", radius=0.17)
    pulsing = torch.stack([(small if t % 2 else large)[:, t] for t in range(8)], dim=1)
    found = measure_outline(pulsing, "circle")
    assert found.overlap.min() > 0.99  # each frame is a circle
    assert found.change == pytest.approx(0.02 / 0.18, rel=0.05)


def test_noise_on_the_outline_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    true = clip("triangle")
    shifts = torch.randint(0, 3, (8, 2), generator=generator).tolist()
    moved = [true[:, t].roll(shift, (1, 2)) for t, shift in enumerate(shifts)]
    doubled = torch.stack([torch.maximum(true[:, t], frame) for t, frame in enumerate(moved)], dim=1)
    noisy = true + 0.3 * torch.randn(true.shape, generator=generator)
    steady = measure_outline(true, "triangle").change
    assert steady is not None
    for worse, overlap in ((doubled, 0.99), (noisy, 0.9)):
        found = measure_outline(worse, "triangle")
        assert found.overlap.mean() < overlap
        assert found.change is not None and found.change > 3 * steady


def test_nothing_to_see() -> None:
    found = measure_outline(torch.full((3, 4, 64, 64), -0.8), "bar")
    assert not found.overlap.any() and found.change is None
    one = measure_outline(clip("bar", frames=1), "bar")
    assert one.overlap[0] > 0.995 and one.change is None


def test_results_count_each_video_once() -> None:
    quality = OutlineQuality()
    quality.add([clip("cross"), clip("circle")], ["a cyan Cross going down and right", "a still life"])
    found = quality.result()
    assert {name: interval.count for name, interval in found.items()} == {
        "shape IoU": 1,
        "frames with IoU > 0.9": 1,
        "outline change": 1,
    }
    assert found["shape IoU"].mean > 0.995 and found["frames with IoU > 0.9"].mean == 1.0
    assert OutlineQuality().result() == {}
