"""`stdit data cut`, `score`, `filter`, `dedup`, `caption` and `curate`: raw video to a training set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdit_cli.workers import (
    Gpus,
    ModelProcesses,
    Processes,
    Ray,
    count_cpus,
    interruptible,
    make_executor,
    one_per_gpu,
)

if TYPE_CHECKING:
    from stdit_data.curation.engine import Outcome
    from stdit_data.workers.executors import Executor

app = typer.Typer()
FLAGGED_SHOWN = 5


class Detector(StrEnum):
    """Ways to find scene changes."""

    adaptive = "adaptive"
    content = "content"
    transnetv2 = "transnetv2"


Raw = Annotated[str, typer.Argument(help="Folder of videos and images, or a manifest of them.")]
Source = Annotated[str, typer.Argument(help="Manifest (.parquet, .csv, .jsonl) or folder.")]
Out = Annotated[str, typer.Argument(help="Manifest to write, .parquet; its rejects go to NAME.rejects.jsonl.")]
Root = Annotated[str | None, typer.Option(help="Folder that relative paths start from.", show_default="the manifest's")]


@app.command()
def cut(
    source: Raw,
    out: Out,
    detector: Annotated[
        Detector, typer.Option(help="PySceneDetect's adaptive or content detector, or TransNetV2.")
    ] = Detector.adaptive,
    threshold: Annotated[float | None, typer.Option(help="The detector's threshold.", show_default="its own")] = None,
    trim: Annotated[float, typer.Option(min=0, help="Seconds to trim on both sides of a cut.")] = 0.5,
    shortest: Annotated[float, typer.Option("--min", min=0, help="Shortest segment in seconds.")] = 2.0,
    longest: Annotated[
        float, typer.Option("--max", min=0, help="Longest segment in seconds; longer ones are divided.")
    ] = 10.0,
    fades: Annotated[bool, typer.Option(help="Also end segments where the picture is black.")] = True,
    root: Root = None,
    processes: Processes = None,
    ray: Ray = None,
    gpus: Gpus = 0.0,
) -> None:
    """Find scene changes in raw videos and write a row for each segment; no video is re-encoded."""
    from stdit_data.curation.cut import CutStep

    threads = _threads(processes)
    step = CutStep(detector.value, threshold, trim, shortest, longest, fades, threads=threads, gpus=gpus)
    _run(step, source, out, root, processes, ray)


@app.command()
def score(
    source: Source,
    out: Out,
    fps: Annotated[float, typer.Option(help="Frames per second to analyse.")] = 2.0,
    size: Annotated[int, typer.Option(min=32, help="Longer side of the analysed frames in pixels.")] = 256,
    text: Annotated[
        bool, typer.Option("--text", help="Also measure the area that text covers (needs the extra ocr of stdit-data).")
    ] = False,
    clip: Annotated[
        str | None, typer.Option(help="CLIP model (folder or Hub id) to measure how well captions fit.")
    ] = None,
    aesthetic: Annotated[
        str | None, typer.Option(help="Aesthetic head for that model (.pth or .safetensors), to rate the picture.")
    ] = None,
    root: Root = None,
    processes: Processes = None,
    ray: Ray = None,
    gpus: Gpus = 0.0,
) -> None:
    """Measure every clip from one decode: sharpness, motion, black bars and more; no row is dropped."""
    from stdit_data.curation.score import ScoreStep

    step = ScoreStep(fps, size, text, clip, aesthetic, threads=_threads(processes), gpus=gpus)
    _run(step, source, out, root, processes, ray)


@app.command("filter")
def filter_rows(
    source: Source,
    out: Out,
    keep: Annotated[
        str | None, typer.Option(help="Condition over columns: 'motion > q10 and text_area < 0.02'.", metavar="EXPR")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Named thresholds; `list` shows them.")] = None,
    partly: Annotated[
        bool, typer.Option("--partly", help="Leave out the preset's rules whose columns are missing.")
    ] = False,
    report: Annotated[str | None, typer.Option(help="HTML page: histograms, and the clips at each threshold.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips on each side of a threshold in the report.")] = 8,
    root: Root = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, or workers of the Ray cluster.")] = 1,
    ray: Ray = None,
) -> None:
    """Keep the rows that fulfil a condition or preset; record every other row with its column, value and limit."""
    from stdit_data.curation.filtering.expression import Condition
    from stdit_data.curation.filtering.filter import open_filter
    from stdit_data.curation.filtering.presets import load_preset
    from stdit_data.curation.tables import open_rows
    from stdit_data.errors import DataError

    if preset == "list":
        _list_presets()
        return
    rows = open_rows(source, root=root)
    conditions = [keep] if keep else []
    if preset is not None:
        conditions.append(load_preset(preset).condition(rows.schema.names, partly=partly))
    if not conditions:
        raise DataError("nothing to filter by: give --keep or --preset (or both)")
    for one in conditions:
        Condition(one)  # each alone, so that an error quotes the condition as written
    together = conditions[0] if len(conditions) == 1 else " and ".join(f"({one})" for one in conditions)
    step = open_filter(together, rows)
    _run(step, source, out, root, processes, ray)
    if report is not None:
        from stdit_data.curation.filtering.report import write_report  # with torch

        with _bar("report") as progress:
            write_report(report, rows, step.keep, clips=clips, workers=count_cpus(), progress=progress)
        typer.echo(report)


@app.command()
def dedup(
    source: Source,
    out: Out,
    fps: Annotated[float, typer.Option(help="Frames per second to compare.")] = 1.0,
    distance: Annotated[
        int, typer.Option(min=0, help="Bits (of 256) by which the hashes of equal frames may differ.")
    ] = 24,
    share: Annotated[float, typer.Option(help="Share of the shorter clip that must occur in the other.")] = 0.5,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Keep all clips, and only write the column `group`.")
    ] = False,
    root: Root = None,
    processes: Processes = None,
    ray: Ray = None,
) -> None:
    """Find identical files, overlapping parts of a video and clips that look the same; keep the sharpest of each."""
    from stdit_data.curation.dedup import HashStep, Matching
    from stdit_data.curation.dedup import dedup as find
    from stdit_data.curation.tables import open_rows
    from stdit_data.workers.work import find_share

    step, matching = HashStep(fps, threads=_threads(processes)), Matching(distance, share, keep_all)
    with _bar("hash") as progress, interruptible(f"{out}.parts"):
        rows, executor = open_rows(source, root=root), make_executor(processes, ray)
        outcome = find(rows, out, executor, step=step, matching=matching, share=find_share(), progress=progress)
    _tell(outcome)


@app.command()
def caption(
    source: Source,
    out: Out,
    model: Annotated[
        str | None,
        typer.Option(help="Captioner (folder or Hub id): LLaVA, LLaVA-OneVision, Qwen-VL; or a server's model."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a server with OpenAI's API (vLLM, SGLang), in place of a local model.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask after the images; {count} is their number.", show_default="built in")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 320,
    size: Annotated[int, typer.Option(min=32, help="Longer side of the frames in pixels.")] = 768,
    seed: Annotated[int, typer.Option(help="Seed for sampling; each clip derives its own.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing captions.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Clips per batch, or concurrent requests to the server.")] = 8,
    root: Root = None,
    processes: ModelProcesses = None,
    ray: Ray = None,
    gpus: Gpus = 0.0,
) -> None:
    """Describe clips and images that have no caption from three frames; flag answers that are no good captions."""
    from stdit_data.curation.caption import CaptionStep, checked

    processes = processes or (None if ray else _for_captions(server))
    options: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "size": size,
        "seed": seed,
        "batch": batch,
    }
    threads = _threads(processes)
    step = CaptionStep(model, server, prompt, **options, overwrite=overwrite, threads=threads, gpus=gpus)
    if _run(checked(step), source, out, root, processes, ray):
        _tell_flags(out)


@app.command()
def curate(
    source: Raw,
    out: Annotated[str, typer.Argument(help="Manifest to write, .parquet; those of all steps go to NAME.steps.")],
    preset: Annotated[
        str, typer.Option(help="Settings of cut and filter; `filter --preset list` shows them.")
    ] = "basic",
    keep: Annotated[str | None, typer.Option(help="Further condition over columns.", metavar="EXPR")] = None,
    partly: Annotated[
        bool, typer.Option("--partly", help="Leave out the preset's rules whose columns are missing.")
    ] = False,
    text: Annotated[bool, typer.Option("--text", help="Also measure the area that text covers.")] = False,
    clip: Annotated[str | None, typer.Option(help="CLIP model to measure how well captions fit.")] = None,
    aesthetic: Annotated[str | None, typer.Option(help="Aesthetic head for that model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Captioner, as for `stdit data caption`.", show_default="no captions")
    ] = None,
    server: Annotated[str | None, typer.Option(help="URL of a server with OpenAI's API that writes captions.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips per batch of the captioner.")] = 8,
    root: Root = None,
    processes: Processes = None,
    ray: Ray = None,
    gpus: Gpus = 0.0,
) -> None:
    """Run cut, score, filter, dedup and, with a captioner, caption one after another; without flagged captions."""
    from dataclasses import replace

    from stdit_data.curation.caption import CaptionStep, checked
    from stdit_data.curation.curate import Recipe, steps_folder
    from stdit_data.curation.curate import curate as run_steps
    from stdit_data.curation.cut import CutStep
    from stdit_data.curation.dedup import HashStep
    from stdit_data.curation.engine import rejects_path
    from stdit_data.curation.filtering.presets import load_preset
    from stdit_data.curation.score import ScoreStep
    from stdit_data.curation.tables import open_rows
    from stdit_data.errors import DataError
    from stdit_data.workers.work import find_share

    if find_share().world > 1:
        raise DataError(
            "curate divides its work by --processes or --ray; under torchrun or Slurm run each step by itself"
        )
    threads, chosen = _threads(processes), load_preset(preset)
    recipe = Recipe(
        CutStep(**chosen.cut, threads=threads),
        ScoreStep(text=text, clip=clip, aesthetic=aesthetic, threads=threads, gpus=gpus),
        "",
        HashStep(threads=threads),
    )
    rows = open_rows(source, root=root)
    rule = chosen.condition(recipe.scored_columns(rows), partly=partly)
    recipe = replace(recipe, keep=f"({rule}) and ({keep})" if keep else rule)
    if model or server:
        captions = CaptionStep(model, server, batch=batch, threads=count_cpus(), gpus=gpus)
        recipe = replace(recipe, caption=checked(captions))

    def executor(name: str) -> Executor:
        width = {"filter": 1, "flags": 1, "caption": None if ray else _for_captions(server)}.get(name, processes)
        return make_executor(width, ray)

    lines = []
    with _steps_bar() as progress, interruptible(steps_folder(out)):
        for name, outcome in run_steps(rows, out, executor, recipe, progress=progress):
            rejects = f", {outcome.rejects} rejected" if outcome.rejects else ""
            lines.append(f"{name}: {outcome.rows} rows{rejects}")
    typer.echo("\n".join([*lines, f"{out}: {outcome.rows} rows; what was rejected, and why: {rejects_path(out)}"]))


def _run(step: Any, source: str, out: str, root: str | None, processes: int | None, ray: str | None) -> bool:
    """Run a step with a progress bar, print its result, and return whether the output is complete."""
    from stdit_data.curation.engine import run
    from stdit_data.curation.tables import open_rows
    from stdit_data.workers.work import find_share

    with _bar(step.name) as progress, interruptible(f"{out}.parts"):
        outcome = run(
            step,
            open_rows(source, root=root),
            out,
            make_executor(processes, ray),
            share=find_share(),
            progress=progress,
        )
    _tell(outcome)
    return outcome.complete


def _for_captions(server: str | None) -> int:
    """Return the number of processes for a captioner: one for each GPU; for a server, or without a GPU, one."""
    return 1 if server is not None else one_per_gpu()


def _threads(processes: int | None) -> int:
    """Return the number of decoding threads per process, so that all of them fill the CPUs."""
    return max(1, count_cpus() // (processes or count_cpus()))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Make a progress bar with the time left; without a terminal, print a line from time to time."""
    with _steps_bar() as progress:
        yield progress(name)


@contextmanager
def _steps_bar() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Make a bar for several steps, one after another: give it a step's name for what reports its progress."""
    from rich.console import Console

    from stdit_cli.console import CountingBar

    with CountingBar(Console(), transient=False) as bar:
        task = bar.add_task("", total=None)

        def begin(name: str) -> Callable[[int, int], None]:
            bar.reset(task, description=name, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin


def _tell(outcome: Outcome) -> None:
    """Print what was written."""
    from stdit_data.curation.engine import rejects_path

    if not outcome.complete:
        typer.echo(f"this process's shards are finished; the last process writes {outcome.out}")
        return
    rejects = f"; {outcome.rejects} rejected, see {rejects_path(outcome.out)}" if outcome.rejects else ""
    kept = f" ({outcome.resumed} of {outcome.shards} shards were already done)" if outcome.resumed else ""
    typer.echo(f"{outcome.out}: {outcome.rows} rows{rejects}{kept}")


def _tell_flags(out: str) -> None:
    """Print how many captions are flagged, the first of them, and how to drop them all."""
    from collections import Counter

    from stdit_data.curation.caption import flagged

    counts: Counter[str] = Counter()
    for row in flagged(out):
        counts[row["caption_flag"]] += 1
        if counts.total() <= FLAGGED_SHOWN:
            span = "" if row.get("start") is None else f" {row['start']:g} s"
            typer.echo(f"  {row['caption_flag']}: {row['path']}{span}: {(row['caption'] or '')[:80]}")
    if counts:
        listed = ", ".join(f"{count} {flag}" for flag, count in counts.most_common())
        typer.echo(
            f"{counts.total()} captions are flagged ({listed}): caption {out} again with another --model or --seed, or "
            "drop them by `stdit data filter --keep 'caption_flag is None'`, which lists each"
        )


def _list_presets() -> None:
    from stdit_data.curation.filtering.presets import load_preset, preset_names

    for name in preset_names():
        preset = load_preset(name)
        typer.echo(f"{name}: {preset.description}")
        for rule in preset.rules:
            typer.echo(f"  {rule.keep}    {rule.source}")
