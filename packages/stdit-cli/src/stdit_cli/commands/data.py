"""`stdit data validate`, `preview` and `convert`: check and show what a run would train on."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from stdit_cli.commands import curation, latents
from stdit_cli.workers import RenamedThreads, find_threads

if TYPE_CHECKING:
    from stdit_data.clip import ClipDataset
    from stdit_data.datasets.videos import VideoDataset
    from stdit_data.manifests.converters.common import Conversion
    from stdit_data.manifests.validate import Report

app = typer.Typer(
    no_args_is_help=True, help="From raw video to a training set: curate, check, preview and encode clips."
)
app.registered_commands += curation.app.registered_commands  # help lists the pipeline in its order
convert = typer.Typer(no_args_is_help=True, help="Make a manifest from a public set's own metadata.")
app.add_typer(convert, name="convert")


class Short(StrEnum):
    """What to do with clips that have too few frames."""

    skip = "skip"
    hold = "hold"


Source = Annotated[
    str, typer.Argument(help="Folder, manifest (.csv, .jsonl, .parquet) or URL of one; `shapes` for the built-in set.")
]
Root = Annotated[str | None, typer.Option(help="Folder that relative paths start from.", show_default="the manifest's")]
Confine = Annotated[bool, typer.Option("--confine", help="Refuse paths that lead out of that folder.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second to read, instead of a frame interval.")]
Interval = Annotated[int | None, typer.Option(help="Frame interval: take every n-th source frame.")]
Stream = Annotated[
    int | None, typer.Option(help="Index of the video stream in each file, from 0.", show_default="FFmpeg's choice")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that read files.")]
Out = Annotated[str, typer.Argument(help="Manifest to write: .csv, .jsonl or .parquet.")]


@app.command()
def validate(
    source: Source,
    root: Root = None,
    confine: Confine = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Also report clips too short for this many frames.")] = None,
    interval: Interval = None,
    fps: Fps = None,
    stream: Stream = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Decode every frame, and compare the manifest's checksums.")
    ] = False,
    threads: Threads = 8,
    workers: RenamedThreads = None,
    show: Annotated[int, typer.Option(min=0, help="Problems to print.")] = 20,
    report: Annotated[str | None, typer.Option(help="JSON Lines file for all findings.")] = None,
    write: Annotated[
        str | None, typer.Option(help="Manifest to write of the valid clips, with their metadata.")
    ] = None,
) -> None:
    """Check that every entry is readable, captioned, unique and matches the manifest; exit with 1 if not."""
    from rich.console import Console

    from stdit_cli.console import CountingBar
    from stdit_data.manifests.format import read_manifest, write_manifest
    from stdit_data.video.segments import default_sampling

    threads = find_threads(threads, workers) or threads
    manifest = None if _is_shapes(source) else read_manifest(source, root=root, confine=confine)

    from stdit_data.manifests.validate import check_dataset, good_entries
    from stdit_data.manifests.validate import validate as check

    with CountingBar(Console(), "clips") as bar:
        task = bar.add_task("probing", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if manifest is None:
            found = check_dataset(_open(source, frames or 16, 64, 64), progress=progress)
        else:
            sampling = default_sampling(frames, interval, fps) if frames is not None else None
            found = check(
                manifest, sampling=sampling, stream=stream, thorough=thorough, workers=threads, progress=progress
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
    out: Annotated[str, typer.Option(help="Name of the files to write, OUT.png and OUT.mp4.")] = "preview",
    root: Root = None,
    confine: Confine = False,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 16,
    height: Annotated[int, typer.Option(min=1, help="Height in pixels.")] = 256,
    width: Annotated[int, typer.Option(min=1, help="Width in pixels.")] = 256,
    interval: Interval = None,
    fps: Fps = None,
    short: Annotated[
        Short, typer.Option(help="What to do with clips that are too short: skip them, or hold the last frame.")
    ] = Short.skip,
    stream: Stream = None,
    samples: Annotated[int, typer.Option(min=1, help="Clips to show.")] = 6,
    columns: Annotated[int, typer.Option(min=1, help="Frames per row of the sheet.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of clips.")] = 0,
) -> None:
    """Show a few clips as training would see them: a contact sheet (PNG) with captions, and a wall of clips (mp4)."""
    from stdit_data.manifests.format import check_manifest

    if not _is_shapes(source):
        check_manifest(source)

    from stdit_data.datasets.videos import open_videos
    from stdit_data.preview import preview as look

    details = None
    if _is_shapes(source):
        dataset = _open(source, frames, height, width)
    else:
        dataset = videos = open_videos(
            source,
            frames=frames,
            height=height,
            width=width,
            interval=interval,
            fps=fps,
            short=short.value,
            stream=stream,
            root=root,
            confine=confine,
            empty_captions=True,
        )
        if source.endswith(".rejects.jsonl"):
            details = _reasons(source, videos)
    for error in look(
        dataset, f"{out}.png", f"{out}.mp4", samples=samples, columns=columns, seed=seed, details=details
    ):
        typer.echo(f"left out: {error}", err=True)
    typer.echo(f"{out}.png\n{out}.mp4")


def _reasons(rejects: str, videos: VideoDataset) -> Callable[[int], str]:
    """Return a function that tells why a clip of a rejects file was rejected."""
    from stdit_data.curation.engine import read_reasons

    reasons = read_reasons(rejects)

    def reason(index: int) -> str:
        entry = videos.entries[index]
        return reasons.get((entry.path, entry.start, entry.end), "")

    return reason


@convert.command()
def hdvg(
    metadata: Annotated[str, typer.Argument(help="JSON file of the data set.")],
    out: Out,
    videos: Annotated[
        str | None, typer.Option(help="Folder of downloaded clips; clips without a file are left out.")
    ] = None,
) -> None:
    """Convert HD-VG-130M, one clip per scene."""
    from stdit_data.manifests.converters import hdvg as kind

    _write(kind.convert(metadata, videos=videos), out, videos)


@convert.command()
def pexels(
    folder: Annotated[str, typer.Argument(help="Folder of videos.")],
    out: Out,
    captions: Annotated[
        str | None, typer.Option(help="JSON file or manifest of captions.", show_default="a .txt beside each video")
    ] = None,
) -> None:
    """Convert a Pexels-style folder: videos with captions beside them or in a file."""
    from stdit_data.manifests.converters import pexels as kind

    _write(kind.convert(folder, captions=captions), out, folder)


@convert.command()
def ucf101(
    folder: Annotated[str, typer.Argument(help="Folder of the unpacked data set.")],
    out: Out,
    split: Annotated[
        str | None,
        typer.Option(help="List of the data set to convert, e.g. trainlist01.txt.", show_default="all videos"),
    ] = None,
    template: Annotated[str, typer.Option(help="Caption, with {action} for the name of the action.")] = "{action}",
) -> None:
    """Convert UCF-101, whose captions are the actions."""
    from stdit_data.manifests.converters import ucf101 as kind

    _write(kind.convert(folder, split=split, template=template), out, folder)


latents.add_to(app)


def _is_shapes(source: str) -> bool:
    return source.split(":")[0] == "shapes"


def _open(source: str, frames: int, height: int, width: int) -> ClipDataset:
    """Open `shapes`, or a split of it, e.g. `shapes:heldout`."""
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
