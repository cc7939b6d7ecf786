"""Scores a pipeline on `shapes`: does it draw what the prompts say, seen in training and held out?"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_data.shapes import Split
from stdit_train.prompts import Trial, follow_prompts, score


@dataclass(frozen=True)
class Scores:
    """Prompt-following on one split."""

    shares: dict[str, dict[str, float]]  # for all, colour, shape, motion: share, low, high
    trials: list[Trial]


def evaluate_pipeline(
    pipeline: Any,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Generate a video for each of `count` prompts of a split, with fixed seeds, and read it."""

    def generate(prompts: list[str], seeds: list[int]) -> list[Tensor]:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        output = pipeline(prompts, generator=generators, num_inference_steps=steps, guidance_scale=guidance)
        return list(output.frames)

    trials = follow_prompts(generate, split, count, seed, on_progress=on_progress)
    return Scores(score(trials), trials)


def write_scores(scores: dict[str, Scores], settings: dict[str, Any], file: Path) -> None:
    """All shares, prompts, seeds and readings as JSON."""
    content = {
        "settings": settings,
        "scores": {split: found.shares for split, found in scores.items()},
        "trials": {split: [asdict(trial) for trial in found.trials] for split, found in scores.items()},
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
