"""`stdit eval`: score a checkpoint by the videos that it makes, or a VAE by its reconstructions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdit_cli import completion
from stdit_cli.commands.evaluate_vae import VaeEvaluation, run_vae_evaluation
from stdit_train.assets import DEMO, named_source
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.table import Table

    from stdit_model import STDiTPipeline
    from stdit_train.evaluation.evaluate import Scores
    from stdit_train.evaluation.video_metrics import Measure

SPLITS = {"seen": "train", "held-out": "heldout"}
VAE_CLIPS = 32
WHAT, MEASURES, VAE, OUTPUT = "Videos to score", "Measures", "Of a VAE", "Output"  # panels of the options


@dataclass(frozen=True)
class EvaluateOptions:
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
    frames: int | None
    out: Path | None
    as_json: bool = False


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Pipeline folder, run folder or Hub id; or a VAE's folder, run or Hub id.",
            show_default="the bundled demo",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts per split, or captions of --data.", rich_help_panel=WHAT)
    ] = 200,
    split: Annotated[
        str,
        typer.Option(
            help="Prompts of `shapes` to use: seen, held-out or both.",
            autocompletion=completion.choices("seen", "held-out", "both"),
            rich_help_panel=WHAT,
        ),
    ] = "both",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder or manifest of videos for prompts and comparison, instead of `shapes`.", rich_help_panel=WHAT
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP model (folder or Hub id, e.g. openai/clip-vit-base-patch32) for prompt similarity.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    fvd: Annotated[
        str | None,
        typer.Option(
            help="I3D as a TorchScript file, or a transformers video model, for the Fréchet video distance.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    vae_clips: Annotated[
        int,
        typer.Option(
            min=0, help="Clips to encode and decode with the VAE; 0 skips its measures.", rich_help_panel=MEASURES
        ),
    ] = VAE_CLIPS,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of prompts.", rich_help_panel=WHAT)] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default="the checkpoint's", rich_help_panel=WHAT)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", show_default="the checkpoint's", rich_help_panel=WHAT)
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of each video; 1 scores still pictures.",
            show_default="the checkpoint's",
            rich_help_panel=WHAT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for scores, prompts, seeds and readings; it must not exist.", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of --out instead of tables.", rich_help_panel=OUTPUT)
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH", help="Size of the clips in pixels.", show_default="the run's", rich_help_panel=VAE
        ),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for a contact sheet, original | reconstruction.", rich_help_panel=VAE)
    ] = None,
) -> None:
    """Measure how well a checkpoint follows prompts, how smooth its videos are, and how much its VAE loses.

    Of a VAE, measure PSNR, SSIM and flicker of clips that it has encoded and decoded, also by frame position.
    """
    if split not in ("both", *SPLITS):
        raise ConfigError(f"--split {split}: choose {', '.join(SPLITS)} or both")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists: choose another name")
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    splits = list(SPLITS) if split == "both" else [split]
    source = DEMO if checkpoint is None else named_source(checkpoint)
    models = source, prompts, splits, data, clip, fvd
    from stdit_train.components.find_vae import find_vae

    vae = find_vae(source)
    if vae is not None:
        for name, value in {"clip": clip, "fvd": fvd, "steps": steps, "guidance": guidance}.items():
            if value is not None:
                raise ConfigError(f"--{name} is for pipelines, and {source} is a VAE: leave it out")
        asked = VaeEvaluation(source, vae, data, vae_clips, seed, frames, size, sheet, out, as_json)
        run_vae_evaluation(asked)
    elif size is not None or sheet is not None:
        raise ConfigError(f"--size and --sheet are for a VAE, and {source} is none: leave them out")
    else:
        run_evaluation(EvaluateOptions(*models, vae_clips, seed, steps, guidance, frames, out, as_json))


def run_evaluation(options: EvaluateOptions) -> None:
    """Load every model first, so that a missing one is reported at once; then sample, measure and print tables."""
    from rich.console import Console

    from stdit_cli.console import CountingBar
    from stdit_train.assets import resolve_source
    from stdit_train.pipeline.find import find_checkpoint

    source = find_checkpoint(resolve_source(options.checkpoint))  # before the imports that take seconds
    if options.data is not None:
        from stdit_data.manifests.format import check_manifest

        check_manifest(options.data)

    from stdit_train.evaluation.clip_score import load_clip
    from stdit_train.evaluation.evaluate import evaluate_captions, reference_clips, scores_content, write_scores
    from stdit_train.evaluation.fvd import FrechetDistance, load_features
    from stdit_train.evaluation.outline import OutlineQuality
    from stdit_train.evaluation.video_metrics import Smoothness, reconstruction
    from stdit_train.hardware import find_device
    from stdit_train.pipeline.load import load_pipeline

    console, device = Console(highlight=False, stderr=options.as_json), find_device()
    clip = load_clip(options.clip, device) if options.clip else None
    features = load_features(options.fvd, device) if options.fvd else None
    pipeline = load_pipeline(source)
    references = open_references(options, pipeline)

    def measures(name: str) -> list[Measure]:
        found: list[Measure] = [Smoothness()]
        if options.data is None:
            found.append(OutlineQuality())
        if clip is not None:
            found.append(type(clip)(clip.model, clip.tokenizer))
        if features is not None:
            clips = reference_clips(references[name], options.prompts)
            found.append(FrechetDistance(features, (each.video for each in clips)))
        return found

    scores: dict[str, Scores] = {}
    if options.data is None:
        numbers = options.seed, options.steps, options.guidance, options.frames
        scores = score_splits(console, pipeline, options.splits, options.prompts, *numbers, measures)
    else:
        captioned = (entry.caption for entry in references["data"].entries if entry.caption)
        captions = list(islice(captioned, options.prompts))
        with CountingBar(console) as bar:
            task = bar.add_task("prompts", total=len(captions))
            scores["data"] = evaluate_captions(
                pipeline,
                captions,
                seed=options.seed,
                steps=options.steps,
                guidance=options.guidance,
                frames=options.frames,
                measures=measures("data"),
                on_progress=lambda done: bar.update(task, completed=done),
            )
    if options.vae_clips:
        for name, found in scores.items():
            clips = reference_clips(references[name], options.vae_clips)
            outlines = [OutlineQuality()] if options.data is None else []
            found.measures.update(reconstruction(pipeline.vae, clips, outlines))
    if options.data is None and not options.as_json:
        console.print(score_table(scores))
    if not options.as_json:
        console.print(measure_table(scores))
    if options.out is not None or options.as_json:
        settings = {key: value for key, value in asdict(options).items() if key not in ("out", "as_json")}
        if options.steps is None:
            settings["steps"] = pipeline.config.num_inference_steps
        if options.guidance is None:
            settings["guidance"] = pipeline.config.guidance_scale
        if options.frames is None:
            settings["frames"] = pipeline.config.num_frames
        if options.out is not None:
            write_scores(scores, settings, options.out)
            console.print(f"{options.out}")
        if options.as_json:
            typer.echo(json.dumps(scores_content(scores, settings), indent=1))


def open_references(options: EvaluateOptions, pipeline: STDiTPipeline) -> dict[str, Any]:
    """Open the clips to compare with, at the checkpoint's own size, by the name of the set of prompts."""
    sizes = pipeline.config
    size = {"frames": options.frames or sizes.num_frames, "height": sizes.height, "width": sizes.width}
    if options.data is not None:
        from stdit_train.config.schema import DataConfig
        from stdit_train.data.videos import open_clips

        return {"data": open_clips(DataConfig(source=options.data, place="center", **size))}
    from stdit_data.datasets.shapes import ShapesDataset

    splits: dict[str, Any] = {"seen": "val", "held-out": "heldout"}  # clips that no run was trained on
    return {name: ShapesDataset(split=splits[name], seed=options.seed, **size) for name in options.splits}


def score_splits(
    console: Console,
    pipeline: STDiTPipeline,
    splits: list[str],
    count: int,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    measures: Callable[[str], Sequence[Measure]] = lambda name: (),
) -> dict[str, Scores]:
    """Evaluate a pipeline on splits of `shapes`, with a progress bar each.

    Args:
        console: for the bars.
        pipeline: to be scored.
        splits: keys of `SPLITS`.
        count: prompts per split.
        seed: for the choice of prompts.
        steps: denoising steps; None for the pipeline's own.
        guidance: guidance scale; None for the pipeline's own.
        frames: frames of each video; None for the pipeline's own.
        measures: makes the measures of a split from its name.

    Returns:
        The scores by the split's name.
    """
    from stdit_cli.console import CountingBar
    from stdit_train.evaluation.evaluate import evaluate_pipeline

    scores = {}
    with CountingBar(console) as bar:
        for name in splits:
            task = bar.add_task(f"{name} prompts", total=count)

            def advance(done: int, task: Any = task) -> None:
                bar.update(task, completed=done)

            scores[name] = evaluate_pipeline(
                pipeline,
                SPLITS[name],  # type: ignore[arg-type]
                count,
                seed=seed,
                steps=steps,
                guidance=guidance,
                frames=frames,
                measures=measures(name),
                on_progress=advance,
            )
    return scores


def score_table(scores: dict[str, Scores]) -> Table:
    """Tabulate the shares of videos that show what their prompts say, with 95 % intervals."""
    from rich.table import Table

    table = Table(
        "share right (higher is better)", *(f"{name} (of {len(found.trials)})" for name, found in scores.items())
    )
    for aspect in next(iter(scores.values())).shares:
        shares = (found.shares[aspect] for found in scores.values())
        cells = (f"{share['share']:.3f} ({share['low']:.3f} to {share['high']:.3f})" for share in shares)
        table.add_row("all correct" if aspect == "all" else aspect, *cells)
    return table


def measure_table(scores: dict[str, Scores]) -> Table:
    """Tabulate the measures of the videos, with unit, direction and 95 % intervals."""
    from rich.table import Table

    from stdit_train.evaluation.evaluate import MEASURES

    names = list(dict.fromkeys(name for found in scores.values() for name in found.measures))
    table = Table("measure", "unit", "better", *scores)
    for name in names:
        cells = [found.measures.get(name) for found in scores.values()]
        table.add_row(
            name, *MEASURES.get(name, ("", "")), *(f"{cell.text()} (of {cell.count})" if cell else "" for cell in cells)
        )
    return table
