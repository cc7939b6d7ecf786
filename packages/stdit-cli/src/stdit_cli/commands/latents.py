"""`stdit data encode`, `inspect`, `merge`, `sizes`: the cache of latents and text embeddings."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdit_cli import completion
from stdit_cli.settings import SettingsCommand
from stdit_cli.workers import (
    Gpus,
    ModelProcesses,
    Ray,
    RenamedThreads,
    find_threads,
    interruptible,
    make_executor,
    one_per_gpu,
)
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from stdit_data.latents.job import Job, Place
    from stdit_train.components.precompute import Encoding
    from stdit_train.config.schema import TrainConfig
    from stdit_train.distributed.world import World

T5_XXL_WIDTH = 4096
PART_OF = {"vae": "video", "text_encoder": "text"}  # of a cache, by the setting of its encoder
CLIPS = [20_000, 366_000]  # of the sets that Open-Sora's report trains on


class Dtype(StrEnum):
    """Dtypes of a stored cache."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Loading(StrEnum):
    """Ways to load the text encoder."""

    full = "full"
    eight_bit = "8bit"
    offload = "offload"


Cache = Annotated[str, typer.Argument(help="Folder or URL of a cache.")]


def encode(
    source: Annotated[str, typer.Argument(help="Folder or manifest of videos, or `shapes` for the built-in set.")],
    out: Annotated[str, typer.Argument(help="Folder or URL of the cache; finished shards in it are kept.")],
    stage: Annotated[
        str,
        typer.Option(
            help="Stage whose clip settings to use: frames, size, interval, flips.", autocompletion=completion.stages
        ),
    ] = "demo",
    frames: Annotated[int | None, typer.Option(help="Frames per clip.", show_default="the stage's")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.", show_default="the stage's")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.", show_default="the stage's")] = None,
    vae: Annotated[
        str | None, typer.Option(help="VAE: a folder, Hub id or `demo`.", show_default="the stage's")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="T5 encoder: a folder, Hub id or `demo`.", show_default="the stage's")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the stage, e.g. data.place=center."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed for start frames, crops, flips and `shapes`.", show_default="the stage's")
    ] = None,
    variants: Annotated[
        int, typer.Option(min=1, help="Random variants (start frame, crop, flip) stored per clip.")
    ] = 1,
    video_only: Annotated[bool, typer.Option("--video-only", help="Encode the videos only.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Encode the captions only.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Storage dtype.")] = Dtype.bfloat16,
    shard_mb: Annotated[float, typer.Option(min=1e-4, help="Size of a shard in MiB.")] = 256,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that read clips, in each process.", show_default="the stage's")
    ] = None,
    workers: RenamedThreads = None,
    chunk: Annotated[int, typer.Option(min=1, help="Frames per forward pass of an image VAE.")] = 16,
    tiling: Annotated[bool, typer.Option("--tiling", help="Encode large frames in tiles.")] = False,
    text_batch: Annotated[int, typer.Option(min=1, help="Captions per forward pass of the text encoder.")] = 16,
    text_loading: Annotated[
        Loading, typer.Option(help="Load the text encoder in full, in 8 bits, or offloaded layer by layer.")
    ] = Loading.full,
    text_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Device memory for an offloaded text encoder, e.g. 6GiB."),
    ] = None,
    processes: ModelProcesses = None,
    ray: Ray = None,
    gpus: Gpus = 0.0,
) -> None:
    """Encode clips and captions once, to train from with `stdit train --data OUT`.

    Run the same command again to resume an interrupted one. Under torchrun and in a Slurm job array, the processes
    share the work.
    """
    from stdit_data.manifests.format import check_manifest
    from stdit_train.config.load import load_stage, parse_overrides
    from stdit_train.config.resolve import resolve_config

    if video_only and text_only:
        raise ConfigError("--video-only and --text-only: give one of the two, or neither for both parts")
    named = {
        "data.source": source,
        "data.frames": frames,
        "data.height": height,
        "data.width": width,
        "data.vae": vae,
        "data.text_encoder": text_encoder,
        "data.workers": find_threads(threads, workers),
        "seed": seed,
    }
    overrides = {key: value for key, value in named.items() if value is not None} | parse_overrides(setting or [])
    config = resolve_config(load_stage(stage, overrides), overrides)
    if config.data.source != "shapes":
        check_manifest(config.data.source)

    from stdit_data.latents.job import Place
    from stdit_data.workers.work import find_share
    from stdit_train.components.precompute import Encoding

    encoding = Encoding(
        out=out,
        parts=("video",) if video_only else ("text",) if text_only else ("video", "text"),
        variants=variants,
        dtype=dtype.value,
        shard_bytes=round(shard_mb * 2**20),
        chunk=chunk,
        tiling=tiling,
        text_batch=text_batch,
        text_loading=text_loading.value,
        text_memory=text_memory,
    )
    share = find_share()
    if processes is None and ray is None:
        processes = one_per_gpu() if share.world == 1 else 1
    place = Place(share, make_executor(processes, ray), gpus)
    run_encode(config, encoding, place)


def inspect(
    cache: Cache,
    out: Annotated[Path, typer.Option(help="PNG file for the contact sheet.")] = Path("inspect.png"),
    samples: Annotated[int, typer.Option(min=0, help="Entries to decode; 0 writes no contact sheet.")] = 4,
    columns: Annotated[int, typer.Option(min=1, help="Frames per row of the contact sheet.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of entries.")] = 0,
    vae: Annotated[
        str | None, typer.Option(help="VAE to decode with: a folder or Hub id.", show_default="the cache's")
    ] = None,
) -> None:
    """Show a cache's metadata, and decode a few entries to a contact sheet."""
    from rich.console import Console
    from rich.table import Table

    from stdit_data.latents.format import INDEX, read_metadata
    from stdit_data.latents.summary import describe
    from stdit_data.storage.files import exists
    from stdit_data.storage.urls import join
    from stdit_train.assets import resolve_source

    console = Console(highlight=False)
    table = Table(show_header=False, title=cache, title_justify="left")
    for name, value in describe(cache):
        table.add_row(name, value)
    console.print(table)
    about = read_metadata(cache, "video")
    if about is None or samples == 0 or not exists(join(cache, f"video/{INDEX}")):
        return

    from stdit_data.preview import contact_sheet
    from stdit_train.components.precompute import decode_entries

    videos, lines = decode_entries(cache, resolve_source(vae or about["vae"]["source"]), samples, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(videos, lines, columns=columns).save(out)
    console.print(f"{out}: {len(videos)} decoded entries")


def merge(
    cache: Annotated[str, typer.Argument(help="Folder or URL of the cache to add to.")],
    other: Annotated[str, typer.Argument(help="Folder or URL of the cache to copy from; it is not changed.")],
) -> None:
    """Copy into CACHE what it lacks from OTHER: a whole part, or missing shards of one."""
    from rich.console import Console

    from stdit_cli.console import CountingBar
    from stdit_data.latents.merge import merge as merge_caches

    console = Console(highlight=False)
    with CountingBar(console, "shards") as bar:
        task = bar.add_task("copying", total=None)
        complete = merge_caches(cache, other, lambda done, total: bar.update(task, completed=done, total=total))
    for part, whole in complete.items():
        console.print(f"{part}: {'complete' if whole else 'not finished'}")


def sizes(
    clips: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Clips in the data set; repeat for several columns.",
            show_default=" and ".join(map(str, CLIPS)),
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens per caption.")] = 120,
) -> None:
    """Show the size of a cache in bfloat16 for each published stage."""
    from rich.console import Console
    from rich.table import Table

    from stdit_data.latents.summary import human_bytes, moments_bytes, text_bytes
    from stdit_train.config.load import load_stage, stage_names
    from stdit_train.estimate.training import estimate_run

    clips = clips or CLIPS
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


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(cls=SettingsCommand)(encode)
    for command in (inspect, merge, sizes):
        app.command()(command)


def run_encode(config: TrainConfig, encoding: Encoding, place: Place) -> None:
    """Encode this process's share of a stage's clips and captions.

    Args:
        config: settings of the stage.
        encoding: how to encode, and where to.
        place: where it runs.

    Raises:
        ConfigError, DataError: settings, files or components that do not fit.
        Exit: 130, interrupted.
    """
    import tempfile
    from dataclasses import replace

    from rich.console import Console

    from stdit_data.latents.summary import check_readable
    from stdit_train.components.precompute import open_jobs
    from stdit_train.config.resolve import shapes_only
    from stdit_train.distributed.world import World

    console, world = Console(highlight=False), World.from_env()
    unused: dict[str, Any] = {key: "" for key, part in PART_OF.items() if part not in encoding.parts}
    wanted = replace(config.data, **unused)
    if world.is_main and (line := shapes_only(replace(config, data=wanted))):
        console.print(line, soft_wrap=True)
    names = {part: _component_name(getattr(config.data, part)) for part in ("vae", "text_encoder")}
    with tempfile.TemporaryDirectory(prefix="stdit-offload-") as folder:
        if encoding.text_loading == "offload":
            encoding = replace(encoding, offload_folder=Path(folder))
        with interruptible(encoding.out):
            done = [_run_job(console, job, world) for job in open_jobs(config, names, encoding, world, place)]
    if not all(done):
        console.print(f"rank {place.share.rank} is done with its share; the last process to finish writes the index")
        return
    if "video" in encoding.parts and (line := check_readable(encoding.out, config.data.max_reject_share)):
        console.print(line, soft_wrap=True)
    if set(encoding.parts) == {"video", "text"}:
        console.print(f"done: {encoding.out}. Inspect it with: stdit data inspect {encoding.out}")
        console.print(f"train on it with: stdit train --stage {config.stage} --data {encoding.out}")
    else:
        console.print(f"done: the {encoding.parts[0]} part in {encoding.out}; `stdit data merge` combines parts")


def _run_job(console: Console, job: Job, world: World) -> bool:
    """Run the job of one part, with a progress bar on rank 0; return whether the part is complete."""
    from stdit_cli.console import CountingBar

    bar = CountingBar(console, transient=False, disable=not world.is_main)
    what = {"video": "clips", "text": "captions"}[job.part]
    share = job.place.share
    ranks = f" (rank {share.rank} of {share.world})" if share.world > 1 else ""
    if job.done:
        console.print(f"{what}: {job.done} of {job.total} are already done{ranks}")
    with bar:
        task = bar.add_task(f"{what}{ranks}", total=job.total, completed=job.done)
        return job.run(lambda done, total: bar.update(task, completed=done))


def _component_name(source: str) -> str:
    """Return the name that a cache records for a VAE or text encoder: "demo", an absolute path, or a Hub id."""
    from stdit_train.assets import DEMO, is_demo_folder

    if source == DEMO or is_demo_folder(source):
        return DEMO
    return str(Path(source).resolve()) if Path(source).exists() else source
