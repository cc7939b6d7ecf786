"""Test findings of Open-Sora 1.0's report on `shapes`; the tables are in README.md.

    uv run python benchmarks/findings/run.py RUN_DIR [--only QUESTION ...] [--seeds 3] [--minutes 75] [--prompts 40]
    uv run python benchmarks/findings/run.py report RUN_DIR

The first command trains and scores the runs that are missing; interrupted at any moment, it can be typed again. Every
finished run is a file in RUN_DIR/results, and `report` writes README.md from those that exist. One thread is used
unless OMP_NUM_THREADS is set.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from questions import MINUTES, PROMPTS, QUESTIONS, SEEDS, Arm, Question, make_arms, needed_arms
from report import write_report

from stdit_data.errors import DataError
from stdit_data.latents.format import INDEX
from stdit_data.storage.atomic import replace_text, write_atomically
from stdit_model import STDiT
from stdit_model.embed import temporal_positions
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.precompute import Encoding, open_jobs
from stdit_train.config.load import from_dict, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.curriculum import Stage, stage_folder, train_stages
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, RunEnded
from stdit_train.evaluation.evaluate import evaluate_pipeline
from stdit_train.pipeline.load import load_pipeline
from stdit_train.tracking.metrics import read_metrics

INTERRUPTED = 130


class Interrupted(Exception):
    """A run was interrupted and saved."""


@dataclass
class Lines:
    """A callback that prints the loss at every quarter of a run."""

    name: str
    steps: int = 0

    def started(self, step: int, steps: int) -> None:
        self.steps = steps

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        if step % max(self.steps // 4, 1) == 0:
            print(f"{self.name}: step {step} of {self.steps}, loss {values.get('loss', float('nan')):.4f}", flush=True)


class Findings:
    """The runs of one folder.

    Args:
        folder: holds latents, runs and results.
        minutes: time for all questions with three seeds, from which the number of steps follows.
        prompts: seen prompts to score a finished run with; half as many held-out ones are added.
    """

    def __init__(self, folder: Path, minutes: float, prompts: int = PROMPTS) -> None:
        self.folder, self.arms, self.prompts = folder.resolve(), make_arms(minutes), prompts

    def run(self, questions: Sequence[Question], seeds: int) -> None:
        """Train and score the runs that are missing, every arm's first seed before the second seeds.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
            ConfigError: the folder holds runs with other settings.
            RunEnded: the disk is full.
        """
        arms = needed_arms(questions, self.arms)
        for seed in range(seeds):
            for arm in arms:
                if not self._is_done(arm, seed):
                    print(f"{arm.name}, seed {seed}: {arm.about}", flush=True)
                    self._train(arm, seed)

    def result_file(self, arm: Arm, seed: int) -> Path:
        """Return the file with the result of a finished run."""
        return self.folder / "results" / f"{arm.name}-seed{seed}.json"

    def _is_done(self, arm: Arm, seed: int) -> bool:
        file = self.result_file(arm, seed)
        if not file.is_file():
            return False
        result = json.loads(file.read_text())
        _check_same(file, [from_dict(values) for values in result["settings"]], arm.seeded(seed))
        if result["prompts"] != self.prompts:
            raise ConfigError(f"{file} was scored by {result['prompts']} prompts: give --prompts {result['prompts']}")
        return True

    # -- one run ---------------------------------------------------------------------------------------------------

    def _train(self, arm: Arm, seed: int) -> None:
        """Train all stages of a run, from its last checkpoint where it has one; then score it and write its result."""
        folder = self.folder / "runs" / f"{arm.name}-seed{seed}"
        configs = [self._cached(config) for config in arm.seeded(seed)]
        if arm.image is not None:
            image = stage_folder(self.folder / "runs" / f"{arm.image}-seed{seed}", 1, self.arms[arm.image].stages[0])
            configs[0] = replace(configs[0], init=str(pixart_file(image)))
        stages = [Stage(config, config, stage_folder(folder, i, config)) for i, config in enumerate(configs, 1)]
        for stage in stages:
            if stage.run.config_file.is_file():
                _check_same(stage.run.path, [from_dict(stage.run.read_config())], [stage.config])
        ended = None
        try:
            _, outcome = train_stages(stages, lambda _, stage: Lines(f"{arm.name}-seed{seed}/{stage.config.stage}"))
            if outcome is not None and outcome.interrupted:
                raise Interrupted
        except RunEnded as error:
            if "not finite" not in str(error):
                raise
            ended = str(error)  # a result, too: the learning rate is too high
        scores = self._scores(stages[-1].run) if arm.scored and ended is None else {}
        result = read_result(arm, seed, [stage.run for stage in stages], scores, ended)
        result["prompts"] = self.prompts
        self.result_file(arm, seed).parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.result_file(arm, seed), json.dumps(result, indent=1) + "\n")

    def _scores(self, run: RunFolder) -> dict[str, dict[str, float]]:
        """Return the shares of videos that are right by split and aspect; all runs have the same prompts and noise."""
        pipeline = load_pipeline(str(run.path))
        splits: Any = (("seen", "train", self.prompts), ("held-out", "heldout", max(self.prompts // 2, 1)))
        scored = {name: evaluate_pipeline(pipeline, split, count).shares for name, split, count in splits}
        return {name: {aspect: found["share"] for aspect, found in shares.items()} for name, shares in scored.items()}

    def _cached(self, config: TrainConfig) -> TrainConfig:
        """Return settings that read the clips from a cache, encoded once for all seeds and arms."""
        data = config.data
        noise = f"-noise{data.caption_noise:.2f}" if data.caption_noise else ""
        cache = self.folder / "latents" / f"{data.frames}x{data.height}x{data.width}-{data.clips}{noise}"
        if not all((cache / part / INDEX).is_file() for part in ("video", "text")):
            print(f"encoding {data.clips} clips to {cache}", flush=True)
            names = {"vae": data.vae, "text_encoder": data.text_encoder}
            for job in open_jobs(replace(config, seed=0), names, Encoding(str(cache)), World()):
                job.run()
        return replace(config, data=replace(data, source=str(cache), caption_noise=0.0, cache_latents=False))


def read_result(
    arm: Arm, seed: int, runs: Sequence[RunFolder], scores: dict[str, dict[str, float]], ended: str | None
) -> dict[str, Any]:
    """Return the result of a run as plain values; one that ended early has no validation loss."""
    rows = [read_metrics(run.metrics_file) for run in runs]
    curve = [(row["step"], row["validation_loss"]) for row in rows[-1] if "validation_loss" in row]
    seconds = 0.0
    for stage, logged in zip(arm.stages, rows, strict=True):
        rates = [row["samples_per_second"] for row in logged if row.get("samples_per_second")]
        seconds += stage.steps * mean(stage.global_batch / rate for rate in rates) if rates else 0.0
    return {
        "arm": arm.name,
        "seed": seed,
        "about": arm.about,
        "steps": [stage.steps for stage in arm.stages],
        "flops": arm.flops,
        "tokens": arm.tokens,
        "seconds": round(seconds, 1),
        "validation_loss": curve[-1][1] if curve and ended is None else None,
        "curve": curve,
        "shares": scores,
        "skipped": round(sum(row.get("skipped", 0.0) for logged in rows for row in logged)),
        "ended": ended,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "written": time.strftime("%Y-%m-%d"),
        "settings": [to_dict(stage) for stage in arm.seeded(seed)],
    }


def pixart_file(run: RunFolder) -> Path:
    """Write the EMA weights of a finished run of dit on single frames in the layout of PixArt's release.

    An image model has no temporal position; dit adds that of frame 0 to every token, a constant, which goes into the
    patch embedding's bias.
    """
    file = run.path / "pixart.pth"
    if not file.is_file():
        model = STDiT.from_pretrained(run.pipeline / "transformer")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        first = temporal_positions(model.config.hidden_size, 1, model.config.time_scale)[0]
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].squeeze(2)
        weights["x_embedder.proj.bias"] = weights["x_embedder.proj.bias"] + first
        with write_atomically(file) as partial:
            torch.save({"state_dict": weights}, partial)
    return file


def _check_same(where: Path, theirs: Sequence[TrainConfig], ours: Sequence[TrainConfig]) -> None:
    """Check that settings are equal, apart from the folders of VAE, text encoder and cache."""
    if [_placeless(config) for config in theirs] != [_placeless(config) for config in ours]:
        raise ConfigError(
            f"{where} has other settings than this command: give the --minutes it was started with, or another folder"
        )


def _placeless(config: TrainConfig) -> TrainConfig:
    """Replace what depends on the machine: a cache by its folder's name, the VAE and the text encoder by "demo"."""
    data = replace(config.data, source=Path(config.data.source).name, vae="demo", text_encoder="demo")
    return replace(config, init=None if config.init is None else "image", data=data)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if arguments[:1] == ["report"]:
        parser = argparse.ArgumentParser(prog="run.py report", description="Write README.md from finished runs.")
        parser.add_argument("run_dir", type=Path)
        parser.add_argument("--out", type=Path, default=Path(__file__).with_name("README.md"))
        given = parser.parse_args(arguments[1:])
        if not (given.run_dir / "results").is_dir():
            print(f"findings: no finished runs in {given.run_dir} (no results folder there)", file=sys.stderr)
            return 2
        print(write_report(given.run_dir, given.out))
        return 0
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").partition("\n")[0])
    names = [question.name for question in QUESTIONS]
    parser.add_argument("run_dir", type=Path, help="folder of the runs; an interrupted command in it is resumed")
    usual = [question.name for question in QUESTIONS if not question.extra]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=usual, metavar="QUESTION", help=f"{', '.join(names)}; all but demo"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all questions with three seeds, about")
    parser.add_argument(
        "--prompts",
        type=int,
        default=PROMPTS,
        help="seen prompts per run; half as many held-out ones are added",
    )
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.prompts < 1 or not given.minutes > 0:
        parser.error("--seeds, --prompts and --minutes must be above 0")
    try:
        questions = [question for question in QUESTIONS if question.name in given.only]
        Findings(given.run_dir, given.minutes, given.prompts).run(questions, given.seeds)
    except (Interrupted, KeyboardInterrupt):
        print("stopped and saved; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, DataError, RunEnded) as error:
        print(f"findings: {error}", file=sys.stderr)
        return 2
    print(f"all done: uv run python benchmarks/findings/run.py report {given.run_dir}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(main(sys.argv[1:]))
