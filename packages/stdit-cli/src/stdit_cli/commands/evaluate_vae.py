"""`stdit eval` of a VAE by itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from stdit_train.errors import ConfigError

SHAPES_SIZE, VIDEO_SIZE = (9, 64, 64), (17, 256, 256)  # frames, height, width, where no run says


@dataclass(frozen=True)
class VaeEvaluation:
    """What is asked for: a VAE, by its name and its place, the clips, and where the results go."""

    checkpoint: str
    source: str
    data: str | None
    clips: int
    seed: int
    frames: int | None
    size: str | None
    sheet: Path | None
    out: Path | None
    as_json: bool


def run_vae_evaluation(options: VaeEvaluation) -> None:
    """Score a VAE, print tables, and write the scores and the contact sheet that were asked for."""
    from rich.console import Console
    from rich.table import Table

    from stdit_cli.console import CountingBar
    from stdit_data.preview import contact_sheet
    from stdit_data.storage.atomic import replace_text, write_atomically
    from stdit_train.components.load import load_vae
    from stdit_train.evaluation.evaluate import reference_clips
    from stdit_train.evaluation.vae_scores import evaluate_vae
    from stdit_train.hardware import find_device
    from stdit_train.vae.vae_task import side_by_side

    console = Console(highlight=False, stderr=options.as_json)
    vae = load_vae(options.source, find_device(), "eval")
    dataset, size = _clips(options)
    count = min(options.clips, len(dataset))
    if not count:
        raise ConfigError("--vae-clips 0: there is nothing else to measure of a VAE; give 1 or more")
    with CountingBar(console) as bar:
        task = bar.add_task("clips", total=count)
        scores = evaluate_vae(
            vae, reference_clips(dataset, count), on_progress=lambda done: bar.update(task, completed=done)
        )
    table = Table("measure", f"mean of {count} clips of {'x'.join(map(str, size))}")
    for name, interval in scores.measures.items():
        table.add_row(name, interval.text())
    if scores.codes is not None:
        table.add_row("codes used", "{:,} of {:,}".format(*scores.codes))
    positions = Table("frame", "PSNR (dB)", "SSIM")
    for number, (ratio, similarity) in enumerate(scores.positions):
        positions.add_row(str(number), f"{ratio:.2f}", f"{similarity:.4f}")
    if not options.as_json:
        console.print(table)
        console.print(positions)
    if options.sheet is not None:
        pairs = [side_by_side(*pair) for pair in scores.pairs]
        with write_atomically(options.sheet) as partial:
            contact_sheet(pairs, ["original | reconstruction"] * len(pairs), columns=4).save(partial, "PNG")
        console.print(f"{options.sheet}")
    content: dict[str, Any] = {
        "settings": {"vae": options.checkpoint, "data": options.data, "size": list(size), "clips": count},
        "measures": {name: asdict(interval) for name, interval in scores.measures.items()},
        **({} if scores.codes is None else {"codes": dict(zip(("used", "all"), scores.codes, strict=True))}),
        "positions": [{"psnr": ratio, "ssim": similarity} for ratio, similarity in scores.positions],
    }
    text = json.dumps(content, indent=1)
    if options.out is not None:
        replace_text(options.out, text + "\n")
        console.print(f"{options.out}")
    if options.as_json:
        typer.echo(text)


def _clips(options: VaeEvaluation) -> tuple[Any, tuple[int, int, int]]:
    """Open the clips to measure, of the size that was asked for, or else the run's."""
    from stdit_data.datasets.shapes import ShapesDataset
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.config.load import from_dict
    from stdit_train.config.schema import DataConfig
    from stdit_train.data.videos import open_clips

    size = SHAPES_SIZE if options.data is None else VIDEO_SIZE
    data = DataConfig()
    run = next(
        (folder for folder in (Path(options.source), Path(options.source).parent) if (folder / "run.json").is_file()),
        None,
    )
    if run is not None:
        data = from_dict(RunFolder(run).read_config()).data
        size = data.frames, data.height, data.width
    frames, height, width = size
    if options.size is not None:
        height, width = _parse_size(options.size)
    size = options.frames or frames, height, width
    frames, height, width = size
    if options.data is None:
        shapes = ShapesDataset(
            split="val", seed=options.seed, spread=data.spread, frames=frames, height=height, width=width
        )
        return shapes, size
    asked = DataConfig(
        source=options.data,
        place="center",
        empty_captions=True,
        interval=data.interval,
        frames=frames,
        height=height,
        width=width,
    )
    return open_clips(asked), size


def _parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--size {text}: expected HEIGHTxWIDTH, for instance 256x256")
    return int(parts[0]), int(parts[1])
