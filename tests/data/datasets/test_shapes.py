"""The embedded world: what its clips show, and what is held out."""

import itertools

import numpy as np
import pytest
import torch

from stdit_data.datasets.shapes import COLOURS, MOTIONS, SHAPES, ShapesDataset, render, triples
from stdit_data.errors import DataError


def centers(dataset: ShapesDataset, index: int) -> np.ndarray:
    """Where the scene says that the shape is in each frame: [T, 2], shares of the frame."""
    scene = dataset.scene(index)
    frames, height, width = dataset.size
    step = np.asarray(MOTIONS[scene.triple.motion]) * scene.speed * min(height, width) / (width, height)
    return (np.asarray([scene.x, scene.y]) + step * np.arange(frames)[:, None]) % 1.0


def test_held_out_triples_are_not_trained_and_every_pair_of_them_is() -> None:
    seen, held_out = triples("train"), triples("heldout")
    assert len(held_out) >= 20 and not set(seen) & set(held_out)
    assert len(seen) + len(held_out) == len(COLOURS) * len(SHAPES) * len(MOTIONS)
    assert {(t.colour, t.shape) for t in seen} == set(itertools.product(COLOURS, SHAPES))
    assert {(t.colour, t.motion) for t in seen} == set(itertools.product(COLOURS, MOTIONS))
    assert {(t.shape, t.motion) for t in seen} == set(itertools.product(SHAPES, MOTIONS))


def test_a_clip_depends_on_split_seed_and_index_alone() -> None:
    one, other = ShapesDataset(), ShapesDataset()
    assert torch.equal(one.load(7).video, other.load(7, seed=5, epoch=3).video)
    assert not torch.equal(one.load(7).video, one.load(8).video)
    assert not torch.equal(one.load(7).video, ShapesDataset(seed=1).load(7).video)
    assert not torch.equal(one.load(7).video, ShapesDataset(split="val").load(7).video)


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 64, 64), (33, 48, 96)])
def test_a_shape_starts_near_the_middle(frames: int, height: int, width: int) -> None:
    dataset = ShapesDataset(frames=frames, height=height, width=width)
    first = np.stack([centers(dataset, i)[0] for i in range(300)])
    assert np.abs(first - 0.5).max() <= 0.15 + 1e-9
    assert np.abs(first - 0.5).max() > 0.13  # and uses what it may


def test_later_clips_are_cut_out_of_longer_videos() -> None:
    plain, mixed = ShapesDataset(frames=2), ShapesDataset(frames=2, later=0.25)
    scenes = [mixed.scene(i) for i in range(1200)]
    later = [scene for scene in scenes if scene.start]
    assert 0.2 < len(later) / len(scenes) < 0.3
    assert min(scene.x for scene in later) < 0.05 and max(scene.y for scene in later) > 0.95  # it has got anywhere
    assert all(scene == plain.scene(i) for i, scene in enumerate(scenes) if not scene.start)
    index = next(i for i, scene in enumerate(scenes) if scene.start)
    start, stop = mixed.load(index).span
    assert start == scenes[index].start / 8 > 0 and stop == pytest.approx(start + 1 / 8)
    assert mixed.settings() != plain.settings()


def test_a_share_of_single_frames() -> None:
    plain, mixed = ShapesDataset(frames=4), ShapesDataset(frames=4, single_frames=0.25)
    singles = [i for i in range(1200) if mixed.bucket(i).frames == 1]
    assert 0.2 < len(singles) / 1200 < 0.3
    for i in range(20):
        whole, clip = plain.load(i), mixed.load(i)
        assert clip.video.shape[1] == mixed.bucket(i).frames == (1 if i in singles else 4)
        assert torch.equal(clip.video, whole.video[:, : clip.video.shape[1]]) and clip.caption == whole.caption
    assert clip_span(mixed, singles[0]) == 0.0
    assert mixed.settings() != plain.settings() == ShapesDataset(frames=4, single_frames=0.0).settings()


def clip_span(dataset: ShapesDataset, index: int) -> float:
    start, stop = dataset.load(index).span
    return stop - start


def test_a_spread_of_one_half_is_anywhere() -> None:
    dataset = ShapesDataset(frames=1, spread=0.5)
    first = np.stack([centers(dataset, i)[0] for i in range(500)])
    assert first.min() < 0.02 and first.max() > 0.98


def test_what_leaves_one_edge_enters_at_the_other() -> None:
    dataset = ShapesDataset(frames=64)
    index = next(i for i in range(50) if dataset.scene(i).triple.motion == "right")
    video = render(dataset.scene(index), 64, 64, 64)
    shown = (video - video.amin()).abs().sum((0, 2, 3))
    assert shown.min() > 0.8 * shown.max()


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(DataError, match="train, val, heldout"):
        ShapesDataset(split="test")  # type: ignore[arg-type]
