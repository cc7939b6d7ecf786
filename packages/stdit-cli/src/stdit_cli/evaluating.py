"""What `stdit eval` does and shows: prompts, measures, tables."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stdit_cli.commands.evaluate import score_splits, score_table
from stdit_train.assets import resolve


@dataclass(frozen=True)
class Request:
    """The options of `stdit eval`."""

    checkpoint: str
    prompts: int
    splits: list[str]
    data: str | None
    clip: str | None
    fvd: str | None
    vae_clips: int
    seed: int
    steps: int | None
    guidance: float | None
    out: Path | None


def run_evaluation(request: Request) -> None:
    """Load everything that is asked for first, so that what is missing is told at once; then sample and measure."""
    from stdit_train.evaluation.clip_score import load_clip
    from stdit_train.evaluation.evaluate import Scores, evaluate_captions, reference_videos, write_scores
    from stdit_train.evaluation.fvd import FrechetDistance, load_features
    from stdit_train.evaluation.video_metrics import Smoothness, reconstruction
    from stdit_train.hardware import find_device
    from stdit_train.pipeline.load import load_pipeline

    console, device = Console(highlight=False), find_device()
    clip = load_clip(request.clip, device) if request.clip else None
    features = load_features(request.fvd, device) if request.fvd else None
    pipeline = load_pipeline(resolve(request.checkpoint))
    sets = datasets(request, pipeline)

    def measures(name: str) -> list[Any]:
        found: list[Any] = [Smoothness()]
        if clip is not None:
            found.append(type(clip)(clip.model, clip.tokenizer))
        if features is not None:
            found.append(FrechetDistance(features, reference_videos(sets[name], request.prompts)))
        return found

    scores: dict[str, Scores] = {}
    if request.data is None:
        numbers = request.seed, request.steps, request.guidance
        scores = score_splits(console, pipeline, request.splits, request.prompts, *numbers, measures)
    else:
        captions = [entry.caption for entry in sets["data"].entries if entry.caption][: request.prompts]
        with progress(console) as bar:
            task = bar.add_task("prompts", total=len(captions))
            scores["data"] = evaluate_captions(
                pipeline,
                captions,
                seed=request.seed,
                steps=request.steps,
                guidance=request.guidance,
                measures=measures("data"),
                on_progress=lambda done: bar.update(task, completed=done),
            )
    if request.vae_clips:
        for name, found in scores.items():
            found.measures.update(reconstruction(pipeline.vae, reference_videos(sets[name], request.vae_clips)))
    if request.data is None:
        console.print(score_table(scores))
    console.print(measure_table(scores))
    if request.out is not None:
        settings = {key: value for key, value in asdict(request).items() if key != "out"}
        if request.steps is None:
            settings["steps"] = pipeline.config.num_inference_steps
        if request.guidance is None:
            settings["guidance"] = pipeline.config.guidance_scale
        write_scores(scores, settings, request.out)
        console.print(f"{request.out}")


def datasets(request: Request, pipeline: Any) -> dict[str, Any]:
    """The clips to compare with, by the name of the prompts' set, at the checkpoint's own size."""
    sizes = pipeline.config
    size = {"frames": sizes.num_frames, "height": sizes.height, "width": sizes.width}
    if request.data is not None:
        from stdit_train.config.schema import DataConfig
        from stdit_train.data.videos import open_clips

        return {"data": open_clips(DataConfig(source=request.data, place="center", **size))}
    from stdit_data.datasets.shapes import ShapesDataset

    splits: dict[str, Any] = {"seen": "val", "held-out": "heldout"}  # clips that no run was trained on
    return {name: ShapesDataset(split=splits[name], seed=request.seed, **size) for name in request.splits}


def progress(console: Console) -> Progress:
    """A bar that goes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def measure_table(scores: dict[str, Any]) -> Table:
    """Measures of the videos with their 95 % intervals."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found.measures))
    table = Table("measure", *scores)
    for name in names:
        cells = [found.measures.get(name) for found in scores.values()]
        table.add_row(name, *(f"{cell.text()} (of {cell.count})" if cell else "" for cell in cells))
    return table
