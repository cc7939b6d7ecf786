"""Prompt following on `shapes`: the share of videos that show the colour, shape and motion of their prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stdit_data.datasets.shapes import Split, Triple, triples
from stdit_train.evaluation.confidence import wilson_interval
from stdit_train.evaluation.shape_reader import Reading, analyse


@dataclass(frozen=True)
class Trial:
    """One prompt, and what its video shows."""

    triple: Triple
    prompt: str
    seed: int
    reading: Reading


def evaluation_prompts(split: Split, count: int, seed: int = 0) -> list[tuple[Triple, str, int]]:
    """Draw `count` prompts of a split, as (triple, prompt, sampling seed): all its triples in turn, in random order."""
    rng = np.random.default_rng([seed, count, split == "heldout"])
    pool = triples(split)
    chosen: list[tuple[Triple, str, int]] = []
    while len(chosen) < count:
        for i in rng.permutation(len(pool))[: count - len(chosen)]:
            wordings = pool[i].captions()
            chosen.append((pool[i], wordings[rng.integers(len(wordings))], len(chosen)))
    return chosen


def follow_prompts(
    generate: Callable[[list[str], list[int]], Sequence[Tensor]],
    split: Split,
    count: int = 200,
    seed: int = 0,
    batch: int = 10,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Trial]:
    """Generate a video for each of `count` prompts and read what it shows.

    Args:
        generate: called with prompts and seeds, returns videos [3, T, H, W] in [-1, 1].
        split: "train" (seen triples) or "heldout".
        count: number of prompts.
        seed: seed of their choice.
        batch: prompts per call of `generate`.
        on_progress: called with the number of videos done.
    """
    trials: list[Trial] = []
    wanted = evaluation_prompts(split, count, seed)
    for start in range(0, count, batch):
        part = wanted[start : start + batch]
        videos = generate([prompt for _, prompt, _ in part], [video_seed for _, _, video_seed in part])
        for (triple, prompt, video_seed), video in zip(part, videos, strict=True):
            trials.append(Trial(triple, prompt, video_seed, analyse(video)))
        on_progress(len(trials))
    return trials


def score(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """Return for each aspect the share of correct trials and its 95 % interval: {"share", "low", "high"}."""
    scores, matches = {}, [trial.reading.matches(trial.triple) for trial in trials]
    for aspect in matches[0]:
        right = sum(match[aspect] for match in matches)
        low, high = wilson_interval(right, len(trials))
        scores[aspect] = {"share": right / len(trials), "low": low, "high": high}
    return scores
