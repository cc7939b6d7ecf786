"""What the commands of the cache show: a progress bar a part, tables, a contact sheet."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer import Exit

from stdit_cli.training import INTERRUPTED, with_demo_parts
from stdit_data.latents.job import Job
from stdit_train.assets import demo_folder, resolve
from stdit_train.components.precompute import Encoding, Process, decode_entries, open_jobs, this_process
from stdit_train.config.load import load_stage, parse_overrides, stage_names

T5_XXL_WIDTH = 4096


def run_encode(stage: str, named: dict[str, Any], settings: list[str], encoding: Encoding) -> None:
    """Encode this process's share."""
    console, process = Console(highlight=False), this_process()
    overrides = {**named, **parse_overrides(settings)}
    config = with_demo_parts(load_stage(stage, overrides), overrides)
    names = {part: _named(getattr(config.data, part)) for part in ("vae", "text_encoder")}
    with tempfile.TemporaryDirectory(prefix="stdit-offload-") as folder:
        if encoding.text_loading == "offload":
            encoding = replace(encoding, offload_folder=Path(folder))
        try:
            done = [_run(console, job, process) for job in open_jobs(config, names, encoding, process)]
        except KeyboardInterrupt:
            console.print(f"stopped; what is done is in {encoding.out}, the same command goes on")
            raise Exit(INTERRUPTED) from None
    if not all(done):
        console.print(f"rank {process.rank} is done with its share; the last process to finish writes the index")
    elif set(encoding.parts) == {"video", "text"}:
        console.print(f"done: {encoding.out}. Look into it: stdit data inspect {encoding.out}")
        console.print(f"train on it: stdit train --stage {stage} --data {encoding.out}")
    else:
        console.print(f"done: the {encoding.parts[0]} part in {encoding.out}; `stdit data merge` brings parts together")


def _run(console: Console, job: Job, process: Process) -> bool:
    """One part, with a bar that tells the time left; on the first process alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    bar = Progress(*columns, TimeRemainingColumn(), TimeElapsedColumn(), console=console, disable=process.rank > 0)
    what = {"video": "clips", "text": "captions"}[job.part]
    share = f" (rank {process.rank} of {process.world})" if process.world > 1 else ""
    if job.done:
        console.print(f"{what}: {job.done} of {job.total} are there already{share}")
    with bar:
        task = bar.add_task(f"{what}{share}", total=job.total, completed=job.done)
        return job.run(lambda done, total: bar.update(task, completed=done))


def run_inspect(cache: str, out: Path, samples: int, columns: int, seed: int, vae: str | None) -> None:
    """A table, and a PNG where there are whole latents."""
    from stdit_data.files import exists, join
    from stdit_data.latents.format import INDEX, read_about
    from stdit_data.latents.summary import describe
    from stdit_data.preview import contact_sheet

    console = Console(highlight=False)
    table = Table(show_header=False, title=cache, title_justify="left")
    for name, value in describe(cache):
        table.add_row(name, value)
    console.print(table)
    about = read_about(cache, "video")
    if about is None or samples == 0 or not exists(join(cache, f"video/{INDEX}")):
        return
    videos, lines = decode_entries(cache, resolve(vae or about["vae"]["source"]), samples, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(videos, lines, columns=columns).save(out)
    console.print(f"{out}: {len(videos)} entries, decoded")


def run_merge(cache: str, other: str) -> None:
    """Copy, with a bar of files."""
    from stdit_data.latents.merge import merge

    console = Console(highlight=False)
    columns = (TextColumn("copying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        complete = merge(cache, other, lambda done, total: bar.update(task, completed=done, total=total))
    for part, whole in complete.items():
        console.print(f"{part}: {'complete' if whole else 'not finished'}")


def show_sizes(clips: list[int], tokens: int) -> None:
    """A table of the published stages, and a line about captions."""
    from stdit_data.latents.summary import human_bytes, moments_bytes, text_bytes
    from stdit_train.estimate.training import estimate_run

    table = Table("stage", "latents", "a clip", *(f"{count:,} clips" for count in clips))
    for name in stage_names():
        if name == "demo":
            continue
        estimate = estimate_run(load_stage(name, {"micro_batch": 1}))
        size = moments_bytes(estimate.latent)
        totals = [human_bytes(size * count) for count in clips]
        table.add_row(name, "x".join(map(str, estimate.latent)), human_bytes(size), *totals)
    size = text_bytes(tokens, T5_XXL_WIDTH)
    totals = [human_bytes(size * count) for count in clips]
    table.add_row(f"text, {tokens} tokens", f"{tokens}x{T5_XXL_WIDTH}", human_bytes(size), *totals)
    Console(highlight=False).print(table)


def _named(source: str) -> str:
    """What a cache calls a VAE or text encoder: a local path in full, "demo" and hub ids as they are."""
    if source == str(demo_folder()):
        return "demo"
    return str(Path(source).resolve()) if Path(source).exists() else source
