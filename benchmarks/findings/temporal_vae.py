"""Test the report's sentences on spatial-temporal compression on `shapes`; the tables are in temporal_vae.md.

    uv run python benchmarks/findings/temporal_vae.py RUN_DIR [--only PART ...] [--seeds 3] [--real TRAIN TEST]
    uv run python benchmarks/findings/temporal_vae.py report

The first command makes the runs that have no row yet in temporal_vae.csv, and appends each one's row as it is done;
interrupted at any moment, it can be typed again. The second writes temporal_vae.md. One thread is used unless
OMP_NUM_THREADS is set.
"""

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import report
import run as findings  # sets OMP_NUM_THREADS, before torch is imported
import torch
from questions import QUESTIONS
from temporal_vae_measure import real_clips, shapes_clips, vae_row
from temporal_vae_report import FIRST, PATCHES, SHAPES, STILLS, VAES, write_report
from temporal_vae_starts import widened

from stdit_data.errors import DataError
from stdit_data.storage.atomic import write_atomically
from stdit_train.ablation.arms import estimate_arm
from stdit_train.assets import DEMO
from stdit_train.build import open_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import load_vae
from stdit_train.components.precompute import Encoding, open_jobs
from stdit_train.config.load import load_stage
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, RunEnded
from stdit_train.evaluation.evaluate import evaluate_pipeline
from stdit_train.pipeline.load import load_pipeline
from stdit_train.tracking.metrics import read_metrics
from stdit_train.vae.networks import forward_needs

ROWS = Path(__file__).with_name("temporal_vae.csv")
FRAMES, SIDE = SHAPES
VAE_STEPS, VAE_BATCH = 450, 2  # of 4x8x8; the steps of the others follow from its FLOPs
STDIT_STEPS = 3000  # on latents of 1x8x8; the steps of the others follow from its FLOPs
CLIPS = 2048  # that the STDiTs are trained on
CHECKED = 64  # clips that a VAE is measured on
PROMPTS = 200  # held-out prompts, with one seed each
PATCH_MINUTES, PATCH_PROMPTS = 300.0, 100  # run.py's --minutes and --prompts


class Study:
    """The runs of one folder.

    Args:
        folder: holds initial weights, runs and latents.
        real: videos to train VAEs on and to measure them on, folders or manifests; None for `shapes` alone.
    """

    def __init__(self, folder: Path, real: tuple[str, str] | None = None) -> None:
        self.folder, self.real = folder.resolve(), real

    def run(self, names: Sequence[str], seeds: int) -> None:
        """Make the runs that are missing: VAEs, STDiTs, patches, the first seeds of each before the others.

        Args:
            names: of `VAES`, and `PATCHES` for those.
            seeds: of each run.
        """
        make = {"vae": self.vae, "stdit": self.stdit} if self.real is None else {"real": self.vae}
        vaes = [name for name in names if name in VAES]
        runs = [(name, part, seed) for part in make for seed in range(seeds) for name in vaes]
        done = {(row["vae"], row["part"], int(row["seed"])) for row in read_rows()}
        start = "start" if self.real is None else "real-start"
        if (FIRST, start, 0) not in done:
            append({"part": start, "vae": FIRST, "seed": 0, "steps": 0, "tflops": 0.0, **self._measured(DEMO)})
        if self.real is None and (STILLS, start, 0) not in done and any(VAES[name].start == STILLS for name in vaes):
            append({"part": start, "vae": STILLS, "seed": 0, **self.stills()})
        for name, part, seed in runs:
            if (name, part, seed) not in done and (part == "vae" or VAES[name].compared):
                append({"part": part, "vae": name, "seed": seed, **make[part](name, seed)})
        if PATCHES in names and self.real is None:
            for name, seed, row in self.patches(seeds):
                if (name, PATCHES, seed) not in done:
                    append({"part": PATCHES, "vae": name, "seed": seed, **row})

    # -- VAEs ------------------------------------------------------------------------------------------------------

    def vae(self, name: str, seed: int) -> dict[str, Any]:
        """Train a VAE and return its row."""
        config, label = vae_config(name, seed, self.real), f"{name}-seed{seed}"
        if (start := VAES[name].start) is not None:
            config = replace(config, init=self._start(start, config.vae.latent_channels, seed))
        run = self._trained(config, label if self.real is None else f"real-{label}")
        checks = [row for row in read_metrics(run.metrics_file) if "validation_psnr" in row]
        return {**spent(config), "psnr_at_half": checks[0]["validation_psnr"], **self._measured(str(run.path))}

    def stills(self) -> dict[str, Any]:
        """Train the image VAE that codes start from and return its row."""
        config = stills_config()
        return {**spent(config), **self._measured(str(self._trained(config, STILLS).path))}

    def _measured(self, source: str) -> dict[str, Any]:
        """Return what a VAE makes of clips that the study's VAEs are not trained on."""
        real = self.real
        return vae_row(source, shapes_clips() if real is None else real_clips(vae_config(FIRST, 0, real).data))

    def _start(self, name: str, channels: int, seed: int) -> str:
        """Return the folder of an image VAE to start from: `STILLS`, or the demo's with so many latent channels."""
        if name == STILLS:
            vae = RunFolder(self.folder / "runs" / STILLS).vae
            if not vae.is_dir():
                self._trained(stills_config(), STILLS)
            return str(vae)
        folder = self.folder / "start" / f"{channels}-seed{seed}"
        if not folder.is_dir():
            with write_atomically(folder) as partial:
                widened(load_vae(DEMO, torch.device("cpu")), channels, seed).save_pretrained(partial)
        return str(folder)

    # -- STDiTs ----------------------------------------------------------------------------------------------------

    def stdit(self, name: str, seed: int) -> dict[str, Any]:
        """Train an STDiT on the latents of a shape's first VAE, and return its row."""
        for each in (FIRST, name):  # there already, unless the rows are from another folder
            if not (self._first(each) / "vae").is_dir():
                self.vae(each, 0)
        first = stdit_config(FIRST, str(self._first(FIRST)), seed)
        flops = STDIT_STEPS * estimate_arm(first).step_flops
        config = stdit_config(name, str(self._first(name)), seed)
        step = estimate_arm(config).step_flops
        steps = max(round(flops / step), 2)
        config = replace(config, steps=steps, validate_every=steps, sample_every=steps, checkpoint_every=steps // 5 + 1)
        run = self._trained(self._cached(config, name), f"{name}-stdit-seed{seed}")
        shares = evaluate_pipeline(load_pipeline(str(run.path)), "heldout", PROMPTS).shares
        rows = [row for row in read_metrics(run.metrics_file) if "validation_loss" in row]
        found = {aspect: share["share"] for aspect, share in shares.items()}
        aspects = mean(found[aspect] for aspect in ("colour", "shape", "motion"))
        return {
            "steps": steps,
            "tflops": steps * step / 1e12,
            "validation_loss": rows[-1]["validation_loss"],
            "aspects": aspects,
            **found,
        }

    def patches(self, seeds: int) -> list[tuple[str, int, dict[str, Any]]]:
        """Train STDiTs on latents of the image VAE with both patches; return name, seed and row of each."""
        study = findings.Findings(self.folder / PATCHES, PATCH_MINUTES, PATCH_PROMPTS)
        study.run([question for question in QUESTIONS if question.name == PATCHES], seeds)
        rows = []
        for name, runs in report.read_results(study.folder).items():
            for seed, run in runs.items():
                row = {"steps": run["steps"][0], "tflops": run["flops"] / 1e12, **run["shares"]["seen"]}
                row |= {"validation_loss": run["validation_loss"], "aspects": report.value(run, report.ASPECTS)}
                rows.append((name, seed, row))
        return rows

    def _first(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}-seed0"

    def _cached(self, config: TrainConfig, name: str) -> TrainConfig:
        """Return settings that read the clips from a cache, encoded once for all seeds."""
        cache = self.folder / "latents" / name
        if not (cache / "done").is_file():
            names = {"vae": config.data.vae, "text_encoder": config.data.text_encoder}
            for job in open_jobs(replace(config, seed=0), names, Encoding(str(cache)), World()):
                job.run()
            (cache / "done").touch()
        return replace(config, data=replace(config.data, source=str(cache), cache_latents=False))

    def _trained(self, config: TrainConfig, name: str) -> RunFolder:
        """Return a finished run, which goes on from its last checkpoint where it has one."""
        run = RunFolder(self.folder / "runs" / name)
        if open_trainer(config, config, run, findings.Lines(name)).train().interrupted:
            raise KeyboardInterrupt
        return run


def vae_config(name: str, seed: int, real: tuple[str, str] | None = None) -> TrainConfig:
    """Return the settings of a VAE's run on `shapes` or real videos, with as many steps as it has FLOPs for."""

    def of(shape: str, steps: int) -> TrainConfig:
        spaced = {"validate_every": max(steps // 2, 1), "sample_every": steps, "checkpoint_every": 50}
        data = {"frames": FRAMES, "height": SIDE, "width": SIDE, "single_frames": 0.0, "clips": 4096, "workers": 0}
        settings = {"seed": seed, "steps": steps, "global_batch": VAE_BATCH, "init": None, **spaced}
        settings |= {f"data.{key}": value for key, value in data.items()} | VAES[shape].settings
        settings |= {"optimizer.warmup": 20, "optimizer.ema": 0.98}
        if real is not None:
            settings |= {"data.source": real[0], "data.validation_source": real[1], "data.target_fps": 8.0}
            settings |= {"data.crop": "random", "data.empty_captions": True}
        return load_stage("vae-demo-video", settings)

    budget = VAE_STEPS * step_flops(of("4x8x8", VAE_STEPS))
    return of(name, max(round(budget / step_flops(of(name, 2))), 2))


def stills_config() -> TrainConfig:
    """Return the settings of the image VAE that codes start from, 4x4 down."""
    settings = {"seed": 0, "data.height": SIDE, "data.width": SIDE, "data.workers": 0, "vae.channels": [16, 32, 64]}
    return load_stage("vae-demo-image", settings | {"checkpoint_every": 100, "sample_every": 1500})


def step_flops(config: TrainConfig) -> int:
    """Return the FLOPs of a step of a VAE, as torch's counter counts a forward, times three."""
    return 3 * forward_needs(config.vae, config.global_batch, config.data.frames, SIDE, SIDE).flops


def spent(config: TrainConfig) -> dict[str, float]:
    """Return the steps and training FLOPs of a VAE's run."""
    return {"steps": config.steps, "tflops": config.steps * step_flops(config) / 1e12}


def stdit_config(name: str, vae: str, seed: int) -> TrainConfig:
    """Return the settings of an STDiT's run on the latents of a VAE."""
    settings: dict[str, Any] = {
        "seed": seed,
        "data.frames": FRAMES,
        "data.height": SIDE,
        "data.width": SIDE,
        "data.clips": CLIPS,
        "data.workers": 0,
        "data.vae": vae,
        "data.text_encoder": DEMO,
        "model.hidden_size": 64,
        "model.space_scale": SIDE / 64,
        "model.time_scale": 0.5 / VAES[name].temporal,  # positions in frames
    }
    return load_stage("demo", settings)


# -- rows --------------------------------------------------------------------------------------------------------------


def read_rows() -> list[dict[str, str]]:
    """Return the rows of the finished runs."""
    if not ROWS.is_file():
        return []
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))


def append(row: dict[str, Any]) -> None:
    """Add a finished run to the table."""
    told = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()}
    rows: list[dict[str, str]] = [*read_rows(), told]
    names = list(dict.fromkeys(key for each in rows for key in each))
    with write_atomically(ROWS) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if arguments[:1] == ["report"]:
        print(write_report(read_rows(), Path(__file__).with_suffix(".md")))
        return 0
    parser = argparse.ArgumentParser(prog="temporal_vae.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of the runs; an interrupted command in it is resumed")
    names = [*VAES, PATCHES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--real",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="train VAEs on real videos and measure them on others",
    )
    given = parser.parse_args(arguments)
    try:
        Study(given.run_dir, given.real and tuple(given.real)).run(given.only, given.seeds)
    except (KeyboardInterrupt, findings.Interrupted):
        print("stopped and saved; run the same command again to resume", file=sys.stderr)
        return 130
    except (ConfigError, DataError, RunEnded) as error:
        print(f"temporal_vae: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(main(sys.argv[1:]))
