"""`stdit data encode`, `inspect`, `merge`, `sizes`: the cache of latents and text embeddings."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class Loading(StrEnum):
    plain = "plain"
    eight_bit = "8bit"
    offload = "offload"


Cache = Annotated[str, typer.Argument(help="Folder or URL of a cache.")]


def encode(
    source: Annotated[str, typer.Argument(metavar="M", help="Folder or manifest of videos, or `shapes`.")],
    out: Annotated[str, typer.Argument(help="Folder or URL of the cache; what is done there already is kept.")],
    stage: Annotated[str, typer.Option(help="Whose clips: frames, size, interval, flips.")] = "demo",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip, instead of the stage's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, instead of the stage's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, instead of the stage's.")] = None,
    vae: Annotated[str | None, typer.Option(help="VAE: a folder, hub id, or `demo`.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="T5 encoder: a folder, hub id, or `demo`.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the stage, e.g. data.place=center."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of places, crops and flips, and of `shapes`.")] = None,
    variants: Annotated[int, typer.Option(min=1, help="How often each clip: places, crops and flips anew.")] = 1,
    video_only: Annotated[bool, typer.Option("--video-only", help="Latents alone.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Text embeddings alone.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="As stored.")] = Dtype.bfloat16,
    shard_mb: Annotated[float, typer.Option(min=1e-4, help="Megabytes (2^20 bytes) of a shard.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read clips.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Frames that an image VAE takes at once.")] = 16,
    tiling: Annotated[bool, typer.Option("--tiling", help="The VAE goes through large frames in tiles.")] = False,
    text_batch: Annotated[int, typer.Option(min=1, help="Captions encoded at once.")] = 16,
    text_loading: Annotated[
        Loading, typer.Option(help="The text encoder whole, in 8 bits, or offloaded layer by layer.")
    ] = Loading.plain,
    text_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With offload: what it may take of the device, as in 6GiB.")
    ] = None,
) -> None:
    """Encode clips and captions once, to train from with `stdit train --data OUT`.

    Interrupted, the same command goes on. Under torchrun every process takes its share.
    """
    from stdit_cli.encoding_run import run_encode
    from stdit_train.components.precompute import Encoding
    from stdit_train.config.load import ConfigError

    if video_only and text_only:
        raise ConfigError("--video-only and --text-only: give one of the two, or neither for both parts")
    named = {
        "data.source": source,
        "data.frames": frames,
        "data.height": height,
        "data.width": width,
        "data.vae": vae,
        "data.text_encoder": text_encoder,
        "data.workers": workers,
        "seed": seed,
    }
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
    run_encode(stage, {key: value for key, value in named.items() if value is not None}, setting or [], encoding)


def inspect(
    cache: Cache,
    out: Annotated[Path, typer.Option(help="The contact sheet to write.")] = Path("inspect.png"),
    samples: Annotated[int, typer.Option(min=0, help="Entries to decode; 0 decodes none.")] = 4,
    columns: Annotated[int, typer.Option(min=1, help="Frames per row of the sheet.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Draws the entries.")] = 0,
    vae: Annotated[str | None, typer.Option(help="VAE that decodes, instead of the cache's.")] = None,
) -> None:
    """Tell all that is recorded of a cache, and decode a few entries to a contact sheet."""
    from stdit_cli.encoding_run import run_inspect

    run_inspect(cache, out, samples, columns, seed, vae)


def merge(
    cache: Annotated[str, typer.Argument(help="Folder or URL that is added to.")],
    other: Annotated[str, typer.Argument(help="What is copied from: it stays as it is.")],
) -> None:
    """Add to CACHE what OTHER has: a part that it lacks, or shards of one that both have begun."""
    from stdit_cli.encoding_run import run_merge

    run_merge(cache, other)


def sizes(
    clips: Annotated[list[int] | None, typer.Option(min=1, help="Clips of a set; may be given again.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a caption.")] = 120,
) -> None:
    """What the caches of the published stages take, in bfloat16."""
    from stdit_cli.encoding_run import show_sizes

    show_sizes(clips or [20_000, 366_000], tokens)


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for command in (encode, inspect, merge, sizes):
        app.command()(command)
