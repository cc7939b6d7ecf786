"""`stdit data`: check and look at what a run would train on. Commands import what they need, so --help is quick."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stdit_data.clip import ClipDataset
    from stdit_data.manifests.converters.common import Conversion
    from stdit_data.manifests.validate import Report

app = typer.Typer(no_args_is_help=True, help="Validate, preview and convert video data.")
convert = typer.Typer(no_args_is_help=True, help="Make a manifest from a public set's own metadata.")
app.add_typer(convert, name="convert")


class Short(StrEnum):
    skip = "skip"
    hold = "hold"


Source = Annotated[
    str, typer.Argument(help="Folder, manifest (.csv, .jsonl, .parquet) or URL of one; `shapes` for the built-in set.")
]
Root = Annotated[str | None, typer.Option(help="Folder that relative paths start from.")]
Fps = Annotated[float | None, typer.Option(help="Take frames at this rate instead of an interval.")]
Interval = Annotated[int | None, typer.Option(help="Take every so many source frames.")]
Stream = Annotated[int | None, typer.Option(help="Which video stream of each file, from 0; the best without.")]
Workers = Annotated[int, typer.Option(help="Threads.")]
Out = Annotated[str, typer.Argument(help="The manifest to write: .csv, .jsonl or .parquet.")]


@app.command()
def validate(
    source: Source,
    root: Root = None,
    frames: Annotated[int | None, typer.Option(help="Also find clips too short for this many frames.")] = None,
    interval: Interval = None,
    fps: Fps = None,
    stream: Stream = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Decode every frame and compare checksums.")] = False,
    workers: Workers = 8,
    show: Annotated[int, typer.Option(help="Problems to show.")] = 20,
    report: Annotated[str | None, typer.Option(help="Write all findings here (JSON lines).")] = None,
    write: Annotated[str | None, typer.Option(help="Write a manifest of the good clips with their facts here.")] = None,
) -> None:
    """Check every entry: readable, captioned, not there twice, as the manifest says. Exits with 1 if not so."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stdit_data.manifests.format import read_manifest, write_manifest
    from stdit_data.manifests.validate import check_dataset, good_entries
    from stdit_data.manifests.validate import validate as check
    from stdit_data.video.frames import default_sampling

    manifest = None if _is_shapes(source) else read_manifest(source, root=root)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("probing", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if manifest is None:
            found = check_dataset(_open(source, frames or 16, 64, 64), progress=progress)
        else:
            sampling = default_sampling(frames, interval, fps) if frames is not None else None
            found = check(
                manifest, sampling=sampling, stream=stream, thorough=thorough, workers=workers, progress=progress
            )
            if write is not None:
                write_manifest(write, good_entries(manifest, found))
    _print(found, show)
    if report is not None:
        found.write(report)
    if found.bad:
        raise typer.Exit(1)


@app.command()
def preview(
    source: Source,
    out: Annotated[str, typer.Option(help="Writes OUT.png and OUT.mp4.")] = "preview",
    root: Root = None,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 16,
    height: Annotated[int, typer.Option(help="Pixels.")] = 256,
    width: Annotated[int, typer.Option(help="Pixels.")] = 256,
    interval: Interval = None,
    fps: Fps = None,
    short: Annotated[Short, typer.Option(help="Clips too short: skip, or hold the last frame.")] = Short.skip,
    stream: Stream = None,
    samples: Annotated[int, typer.Option(help="Clips to show.")] = 6,
    columns: Annotated[int, typer.Option(help="Frames per row of the sheet.")] = 8,
    seed: Annotated[int, typer.Option(help="Draws the clips.")] = 0,
) -> None:
    """Write a contact sheet (PNG) and a wall (mp4) of a few clips with their captions, as training would see them."""
    from stdit_data.datasets.videos import open_videos
    from stdit_data.preview import preview as look

    if _is_shapes(source):
        dataset = _open(source, frames, height, width)
    else:
        dataset = open_videos(
            source,
            frames=frames,
            height=height,
            width=width,
            interval=interval,
            fps=fps,
            short=short.value,
            stream=stream,
            root=root,
            empty_captions=True,
        )
    for error in look(dataset, f"{out}.png", f"{out}.mp4", samples=samples, columns=columns, seed=seed):
        typer.echo(f"left out: {error}", err=True)
    typer.echo(f"{out}.png\n{out}.mp4")


@convert.command()
def hdvg(
    metadata: Annotated[str, typer.Argument(help="The set's JSON file.")],
    out: Out,
    videos: Annotated[str | None, typer.Option(help="Folder of downloaded clips; others are left out.")] = None,
) -> None:
    """HD-VG-130M: a clip per scene."""
    from stdit_data.manifests.converters import hdvg as kind

    _write(kind.convert(metadata, videos=videos), out, videos)


@convert.command()
def pexels(
    folder: Annotated[str, typer.Argument(help="The videos.")],
    out: Out,
    captions: Annotated[str | None, typer.Option(help="JSON or manifest of captions; else name.txt files.")] = None,
) -> None:
    """A Pexels-style folder: videos with captions beside them or in a file."""
    from stdit_data.manifests.converters import pexels as kind

    _write(kind.convert(folder, captions=captions), out, folder)


@convert.command()
def ucf101(
    folder: Annotated[str, typer.Argument(help="The unpacked set.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="One of the set's lists, trainlist01.txt.")] = None,
    template: Annotated[str, typer.Option(help="The caption.")] = "{action}",
) -> None:
    """UCF-101: the action is the caption."""
    from stdit_data.manifests.converters import ucf101 as kind

    _write(kind.convert(folder, split=split, template=template), out, folder)


def _is_shapes(source: str) -> bool:
    return source.split(":")[0] == "shapes"


def _open(source: str, frames: int, height: int, width: int) -> ClipDataset:
    """`shapes`, or `shapes:heldout` and so on."""
    from typing import cast

    from stdit_data.datasets.shapes import ShapesDataset, Split

    split = cast(Split, source.partition(":")[2] or "train")
    return ShapesDataset(frames=frames, height=height, width=width, split=split)


def _print(found: Report, show: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, title=found.source, title_justify="left")
    for name, value in found.summary().items():
        table.add_row(name, value)
    console.print(table)
    for finding in found.bad[:show]:
        line = f"{finding.index}: {finding.path}: {'; '.join(finding.problems)}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)  # whole, to be copied
    if len(found.bad) > show:
        console.print(f"and {len(found.bad) - show} more; --report FILE lists all", markup=False)


def _write(done: Conversion, out: str, folder: str | None) -> None:
    written = done.write(out, folder=folder)
    typer.echo(f"{out}: {written} entries")
    for reason, count in done.skipped.most_common():
        typer.echo(f"left out: {count} x {reason}")
