"""The analyser against clips whose truth is known, and the scores made of its readings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.datasets.shapes import MOTIONS, Scene, ShapesDataset, Split, Triple, render, triples
from stdit_train.evaluation.confidence import wilson_interval
from stdit_train.evaluation.prompt_following import evaluation_prompts, follow_prompts, score
from stdit_train.evaluation.shape_reader import Reading, analyse


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_clips_are_read_right(split: Split) -> None:
    dataset = ShapesDataset(split=split, seed=1)
    right = [analyse(dataset.load(i).video).matches(dataset.scene(i).triple)["all"] for i in range(150)]
    assert np.mean(right) >= 0.99


def test_noise_is_read_as_nothing() -> None:
    video = torch.rand(3, 16, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert analyse(video) == Reading(None, None, None, 16)


def test_an_empty_video_is_read_as_nothing() -> None:
    assert analyse(torch.full((3, 16, 64, 64), -0.8)) == Reading(None, None, None, 16)


@given(
    motion=st.sampled_from(sorted(set(MOTIONS) - {"still"})),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    speed=st.floats(0.03, 0.08),
)
@settings(max_examples=30, deadline=None)
def test_motion_across_the_edges(motion: str, x: float, y: float, speed: float) -> None:
    scene = Scene(Triple("red", "circle", motion), "", x, y, 0.2, speed)
    assert analyse(render(scene, 16, 64, 64)) == Reading("red", "circle", motion, 16)


def test_a_path_that_jumps_has_no_motion() -> None:
    scene = Scene(Triple("red", "cross", "left"), "", 0.5, 0.5, 0.2, 0.05)
    video = render(scene, 16, 64, 64)[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    reading = analyse(video)
    assert reading == Reading("red", "cross", None, 16)


def test_a_single_frame_has_no_motion_to_compare() -> None:
    dataset = ShapesDataset(frames=1, seed=2)
    readings = [analyse(dataset.load(i).video) for i in range(20)]
    matches = [reading.matches(dataset.scene(i).triple) for i, reading in enumerate(readings)]
    assert all(match == {"all": True, "colour": True, "shape": True} for match in matches)


def test_prompts_of_a_split_are_its_triples() -> None:
    wanted = evaluation_prompts("heldout", 56)
    assert sorted(map(repr, {triple for triple, _, _ in wanted})) == sorted(map(repr, triples("heldout")))
    assert wanted == evaluation_prompts("heldout", 56)
    assert all(prompt in triple.captions() for triple, prompt, _ in wanted)


def test_scores_of_a_generator_that_knows() -> None:
    """Half of the videos right, half of another colour: the scores say so."""
    known = {prompt: triple for triple, prompt, _ in evaluation_prompts("train", 20)}

    def generate(prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
        videos = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            triple = known[prompt]
            colour = triple.colour if seed % 2 else ("red" if triple.colour != "red" else "blue")
            videos.append(
                render(Scene(Triple(colour, triple.shape, triple.motion), "", 0.3, 0.6, 0.22, 0.05), 16, 64, 64)
            )
        return videos

    shares = score(follow_prompts(generate, "train", 20))
    assert shares["colour"]["share"] == shares["all"]["share"] == 0.5
    assert shares["shape"]["share"] == shares["motion"]["share"] == 1.0
    assert shares["all"]["low"] < 0.5 < shares["all"]["high"]


def test_wilson_interval_of_a_known_case() -> None:
    low, high = wilson_interval(8, 10)  # Wilson 1927; values from the closed formula, worked by hand
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0 and wilson_interval(0, 3)[0] == 0.0
