"""Score a pipeline: prompt following on `shapes`, and measures of the videos themselves."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_data.clip import Clip, ClipDataset
from stdit_data.datasets.shapes import Split
from stdit_data.storage.atomic import replace_text
from stdit_train.evaluation.confidence import Interval
from stdit_train.evaluation.outline import GOOD
from stdit_train.evaluation.prompt_following import Trial, follow_prompts, score
from stdit_train.evaluation.video_metrics import Measure

# Unit or range of the measures, and which direction is better; "" where that depends on the motion.
MEASURES = {
    "change": ("share of the pixels' range", ""),
    "flicker": ("0 to 2", "lower"),
    "shape IoU": ("0 to 1", "higher"),
    f"frames with IoU > {GOOD:g}": ("share", "higher"),
    "outline change": ("share of the shape's size", "lower"),
    "CLIP similarity": ("100 x cosine", "higher"),
    "FVD": ("distance", "lower"),
    "PSNR (dB)": ("dB", "higher"),
    "SSIM": ("-1 to 1", "higher"),
}
MEASURES |= {f"VAE {name}": meaning for name, meaning in MEASURES.items()}  # of true clips that the VAE has decoded


@dataclass(frozen=True)
class Scores:
    """Scores of the videos of one set of prompts."""

    shares: dict[str, dict[str, float]]  # for all, colour, shape, motion: share, low, high; empty without `shapes`
    trials: list[Trial]
    measures: dict[str, Interval] = field(default_factory=dict)
    prompts: list[tuple[str, int]] = field(default_factory=list)  # with the sampling seed of each


def evaluate_pipeline(
    pipeline: Any,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    measures: Sequence[Measure] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Generate a video for each of `count` prompts of a split, with fixed seeds, and score it.

    Args:
        pipeline: an `STDiTPipeline`.
        split: "train" (seen triples of colour, shape and motion) or "heldout".
        count: number of prompts.
        seed: seed of their choice.
        steps: denoising steps; the pipeline's default unless given.
        guidance: guidance scale; the pipeline's default unless given.
        frames: frames of each video; the pipeline's default unless given. With one, no motion is scored.
        measures: measures of the videos besides prompt following.
        on_progress: called with the number of videos done.
    """

    def generate(prompts: list[str], seeds: list[int]) -> list[Tensor]:
        videos = _sampled(pipeline, prompts, seeds, steps, guidance, frames)
        for measure in measures:
            measure.add(videos, prompts)
        return videos

    trials = follow_prompts(generate, split, count, seed, on_progress=on_progress)
    wanted = [(trial.prompt, trial.seed) for trial in trials]
    return Scores(score(trials), trials, _results(measures), wanted)


def evaluate_captions(
    pipeline: Any,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    measures: Sequence[Measure] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Generate a video for each caption, with seeds counting up from `seed`, and measure it.

    The other arguments are those of `evaluate_pipeline`.
    """
    wanted = [(caption, seed + i) for i, caption in enumerate(captions)]
    for done, (caption, number) in enumerate(wanted, start=1):
        videos = _sampled(pipeline, [caption], [number], steps, guidance, frames)
        for measure in measures:
            measure.add(videos, [caption])
        on_progress(done)
    return Scores({}, [], _results(measures), wanted)


def _sampled(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    steps: int | None,
    guidance: float | None,
    frames: int | None,
) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    numbers = {"num_inference_steps": steps, "guidance_scale": guidance, "num_frames": frames}
    output = pipeline(prompts, generator=generators, **numbers)
    return list(output.frames)


def _results(measures: Sequence[Measure]) -> dict[str, Interval]:
    return {name: found for measure in measures for name, found in measure.result().items()}


def reference_clips(dataset: ClipDataset, count: int) -> Iterator[Clip]:
    """Yield the first `count` clips of a data set, or all if there are fewer."""
    for index in range(min(count, len(dataset))):
        yield dataset.load(index, seed=0, epoch=0)


def scores_content(scores: dict[str, Scores], settings: dict[str, Any]) -> dict[str, Any]:
    """Return all shares, measures, prompts, seeds and readings, for JSON."""
    names = dict.fromkeys(name for found in scores.values() for name in found.measures)
    return {
        "settings": settings,
        "better": {"scores": "higher"} | {name: MEASURES[name][1] for name in names if name in MEASURES},
        "scores": {split: found.shares for split, found in scores.items()},
        "measures": {
            split: {name: _plain(interval) for name, interval in found.measures.items()}
            for split, found in scores.items()
        },
        "prompts": {split: found.prompts for split, found in scores.items()},
        "trials": {split: [asdict(trial) for trial in found.trials] for split, found in scores.items()},
    }


def write_scores(scores: dict[str, Scores], settings: dict[str, Any], file: Path) -> None:
    """Write `scores_content` to a file."""
    replace_text(file, json.dumps(scores_content(scores, settings), indent=1) + "\n")


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "count": interval.count}
