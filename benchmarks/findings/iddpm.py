"""Find out why iDDPM learns the demo's world slowly: one change at a time; the tables are in iddpm.md.

    uv run python benchmarks/findings/iddpm.py RUN_DIR [--only PROBE ...] [--prompts 100]

Trains and scores the probes that are missing, in order, and writes iddpm.md from those that there are. Interrupted at
any moment, it can be typed again. One thread is used unless OMP_NUM_THREADS is set.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import run as findings  # sets OMP_NUM_THREADS, before torch is imported
import torch
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.storage.atomic import replace_text
from stdit_data.transforms import stack_videos, to_float
from stdit_model import STDiTPipeline, video_vae
from stdit_model.diffusion import NUM_TIMESTEPS, NoiseLevel, shift_sigma, signal_to_noise
from stdit_model.sampling.schedulers import use_sampler
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.captions import TextMemory
from stdit_train.config.load import from_dict, set_values, to_dict
from stdit_train.config.schema import ObjectiveConfig, TrainConfig
from stdit_train.curriculum import Stage, train_stages
from stdit_train.data.datasets import build_datasets
from stdit_train.errors import ConfigError, RunEnded
from stdit_train.evaluation.evaluate import evaluate_pipeline
from stdit_train.loss.noise import draw
from stdit_train.loss.objective import timestep_density, training_loss
from stdit_train.pipeline.load import load_pipeline

STEPS = 1200
CLIPS = 1024  # to train on
PROMPTS = 100  # held-out
DECADES = (2, 1, 0, -1, -2, -3, -4)  # log10 of the signal-to-noise ratios at which errors are measured
MEASURED = 32  # clips to measure them on
PAGE = Path(__file__).with_name("iddpm.md")
IDDPM = {"objective.name": "iddpm", "sampling.steps": 25}
V = {**IDDPM, "objective.prediction": "v_prediction"}
NOISIER = {"objective.timesteps": "logit-normal", "objective.logit_mean": 1.0}
SLOWER = {"optimizer.lr": 1e-3, "optimizer.muon_lr": 5e-3}
ALL = 1e12  # min_snr that no ratio reaches: the error of x0 weighted by the ratio itself, as that of epsilon is


@dataclass(frozen=True)
class Sampling:
    """How a trained probe is sampled besides the default."""

    sampler: str = "ddpm"
    steps: int = 25
    guidance: float = 1.7
    clip: float | None = None  # bound of the estimate of x0

    @property
    def name(self) -> str:
        """Return the sampler, its steps, the guidance scale and the bound."""
        clipped = "" if self.clip is None else f", x0 within {self.clip:g}"
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}{clipped}"


@dataclass(frozen=True)
class Probe:
    """The arm `base` of run.py (8 frames of 48x48) with some settings changed."""

    name: str
    about: str
    settings: Mapping[str, Any]
    samplings: tuple[Sampling, ...] = ()

    @property
    def config(self) -> TrainConfig:
        """Return the settings of the run."""
        return from_dict(set_values(to_dict(_base()), {"data.clips": CLIPS, **self.settings}))


@cache
def _base() -> TrainConfig:
    base = findings.make_arms(findings.MINUTES)["base"].stages[0]
    return replace(base, steps=STEPS, validate_every=STEPS, checkpoint_every=STEPS // 4, sample_every=STEPS)


@dataclass
class Findings:
    """The probes of one folder."""

    folder: Path
    prompts: int = PROMPTS
    cached: Any = field(init=False)

    def __post_init__(self) -> None:
        """Share the cache of clips among the probes."""
        self.folder = self.folder.resolve()
        self.cached = findings.Findings(self.folder, findings.MINUTES)._cached

    def file(self, probe: Probe) -> Path:
        """Return the file with a probe's result."""
        return self.folder / "results" / f"{probe.name}.json"

    def run(self, probe: Probe) -> None:
        """Train, measure and score a probe, each unless it has been."""
        file = self.file(probe)
        result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        if result and (from_dict(result["settings"]), result["prompts"]) != (probe.config, self.prompts):
            raise ConfigError(f"{file} has other settings than this command: take another folder")
        run = RunFolder(self.folder / "runs" / probe.name)
        wanted = {"default": None} | {sampling.name: sampling for sampling in probe.samplings}
        if not result:
            print(f"{probe.name}: {probe.about}", flush=True)
            self._train(probe, run)
            result = {"about": probe.about, "settings": to_dict(probe.config), "prompts": self.prompts, "scores": {}}
            result |= {"levels": measure_levels(run, probe.config), "written": time.strftime("%Y-%m-%d")}
        for name, sampling in wanted.items():
            if name not in result["scores"]:
                pipeline = load_pipeline(str(run.path))
                result["scores"][name] = score(pipeline, self.prompts, sampling)
                print(f"{probe.name}, {name}: {result['scores'][name]['all']['share']:.3f}", flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_text(file, json.dumps(result, indent=1) + "\n")

    def _train(self, probe: Probe, run: RunFolder) -> None:
        config = self.cached(probe.config)
        watch = findings.Lines(probe.name)
        outcome = train_stages([Stage(config, config, run)], lambda _number, _stage: watch)[1]
        if outcome is not None and outcome.interrupted:
            raise findings.Interrupted


# -- measuring -------------------------------------------------------------------------------------------------------


def score(pipeline: STDiTPipeline, prompts: int, sampling: Sampling | None) -> dict[str, dict[str, float]]:
    """Return the share of held-out prompts that are right, by aspect."""
    if sampling is None:
        return evaluate_pipeline(pipeline, "heldout", prompts).shares
    use_sampler(pipeline, sampling.sampler)
    if sampling.clip is not None:
        settings = {"clip_sample": True, "clip_sample_range": sampling.clip}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    numbers = {"steps": sampling.steps, "guidance": sampling.guidance}
    return evaluate_pipeline(pipeline, "heldout", prompts, **numbers).shares


def level_of(objective: ObjectiveConfig, snr: float) -> float:
    """Return the number in 0..1 whose noise level has a signal-to-noise ratio, before the timestep's density."""
    if objective.name == "flow":
        sigma = 1 / (1 + snr**0.5)
        return sigma / (objective.shift - (objective.shift - 1) * sigma)
    table = signal_to_noise(torch.arange(NUM_TIMESTEPS), objective.zero_terminal_snr)
    return (float((table.clamp(min=1e-9).log10() - torch.tensor(snr).log10()).abs().argmin()) + 0.5) / NUM_TIMESTEPS


def measure_levels(run: RunFolder, config: TrainConfig) -> list[dict[str, float]]:
    """Measure averaged weights at each signal-to-noise ratio.

    Returns:
        For each of `DECADES`: the loss, the error of x0 as a share of its variance, and the norm of the gradient of the
        mean loss.
    """
    pipeline, objective = load_pipeline(str(run.path)), config.objective
    model = pipeline.transformer.train().requires_grad_(True)
    clips = [build_datasets(config)[1].load(index, seed=0, epoch=0) for index in range(MEASURED)]  # type: ignore[union-attr]
    with torch.no_grad():
        moments = video_vae.encode_moments(pipeline.vae, to_float(stack_videos([clip.video for clip in clips])))
        x0 = video_vae.sample_latents(pipeline.vae, moments)
    noise = draw(config.draw, 0, 0, list(range(MEASURED)), tuple(x0.shape[1:])).noise
    y, mask = TextMemory(pipeline.tokenizer, pipeline.text_encoder, None, config.model.model_max_length, MEASURED)(
        [clip.caption for clip in clips]
    )
    rows = []
    for decade in DECADES:
        level = torch.full((MEASURED,), level_of(objective, 10.0**decade))
        kept: list[tuple[Tensor, Tensor]] = []

        def watched(x_t: Tensor, *rest: Any, kept: Any = kept) -> Tensor:
            output = model(x_t, *rest)
            kept.append((x_t, output))
            return output

        model.zero_grad(set_to_none=True)
        terms = training_loss(watched, objective, x0, noise, level, y, mask)  # type: ignore[arg-type]
        terms["loss"].mean().backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        x_t, output = kept[0]
        predicted = _noise_level(objective, level).clean(x_t, output[:, : x0.shape[1]].float())
        error = ((predicted - x0) ** 2).mean() / x0.var()
        values = {"loss": terms["loss"].mean(), "error": error, "gradient": norm}
        rows.append({"decade": decade} | {name: value.item() for name, value in values.items()})
    return rows


def share_near(objective: ObjectiveConfig, decade: int) -> float:
    """Return the share of training samples whose signal-to-noise ratio is within half a decade of 10**decade."""
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    snr = _snr_of(objective, timestep_density(uniform, objective)).clamp(min=1e-9).log10()
    return float(((snr >= decade - 0.5) & (snr < decade + 0.5)).float().mean())


def _snr_of(objective: ObjectiveConfig, level: Tensor) -> Tensor:
    if objective.name == "flow":
        sigma = shift_sigma(level, objective.shift)
        return ((1 - sigma) / sigma) ** 2
    return signal_to_noise((level * NUM_TIMESTEPS).long(), objective.zero_terminal_snr)


def _noise_level(objective: ObjectiveConfig, level: Tensor) -> NoiseLevel:
    if objective.name == "flow":
        return NoiseLevel.of_flow(shift_sigma(level, objective.shift))
    timestep = (level * NUM_TIMESTEPS).long()
    return NoiseLevel.of_iddpm(timestep, objective.prediction, objective.zero_terminal_snr)


SOLVER = Sampling("dpmsolver++", 20)
PROBES = (
    Probe("flow", "rectified flow, shift 4, as the stage `demo`", {}),
    Probe("published", "iDDPM as published: epsilon", IDDPM, (SOLVER, Sampling(clip=3.0))),
    Probe("v", "v-prediction", V, (SOLVER,)),
    Probe("weight", "epsilon, its error weighted as that of v", {**IDDPM, "objective.weighting": "velocity"}),
    Probe("v-unweighted", "v, its error weighted as that of epsilon", {**V, "objective.min_snr": ALL}),
    Probe("v-zero", "v-prediction, zero terminal SNR", {**V, "objective.zero_terminal_snr": True}),
    Probe("min-snr", "epsilon, min-SNR 5", {**IDDPM, "objective.min_snr": 5.0}),
    Probe("no-bound", "epsilon, without the variational bound", {**IDDPM, "objective.bound": 0.0}),
    Probe("noisier", "epsilon, logit-normal timesteps around 730", {**IDDPM, **NOISIER}),
    Probe("slower", "epsilon, a third of both learning rates", {**IDDPM, **SLOWER}),
    Probe("longer-ema", "epsilon, EMA 0.998 instead of 0.99", {**IDDPM, "optimizer.ema": 0.998}),
)


# -- the page --------------------------------------------------------------------------------------------------------


def weights_table() -> list[str]:
    """Return, for each signal-to-noise ratio, how often it is trained on, and what an error of x0 weighs there."""
    flow, iddpm = PROBES[0].config.objective, PROBES[1].config.objective
    rows = [
        "| SNR | samples, flow (shift 4) | samples, iDDPM | flow | epsilon | v | epsilon, min-SNR 5 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for decade in DECADES:
        snr = 10.0**decade
        shares = (f"{share_near(objective, decade):.0%}" for objective in (flow, iddpm))
        weights = (f"{weight:.2g}" for weight in ((1 + snr**0.5) ** 2, snr, snr + 1, min(snr, 5.0)))
        rows.append("| " + " | ".join([f"1e{decade}", *shares, *weights]) + " |")
    return rows


def level_table(results: Mapping[str, Any], measure: str, digits: str) -> list[str]:
    """Return a measure of all probes by signal-to-noise ratio."""
    heads = [f"SNR 1e{decade}" for decade in DECADES]
    rows = ["| probe | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, result in results.items():
        rows.append(f"| {name} | " + " | ".join(f"{row[measure]:{digits}}" for row in result["levels"]) + " |")
    return rows


def score_table(results: Mapping[str, Any]) -> list[str]:
    """Return the shares of held-out prompts that are right, with 95 % intervals, for all probes and samplings."""
    rows = ["| probe | what | sampling | all correct | colour | shape | motion |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        for sampling, shares in result["scores"].items():
            found = (f"{part['share']:.2f} ({part['low']:.2f} to {part['high']:.2f})" for part in shares.values())
            cells = [name, result["about"], "the probe's own" if sampling == "default" else sampling, *found]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def write_page(folder: Path, page: Path) -> None:
    """Replace the tables of the page, each between `<!-- NAME -->` and `<!-- end -->`, by those of a folder."""
    files = {probe.name: folder / "results" / f"{probe.name}.json" for probe in PROBES}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    tables = {
        "weights": weights_table(),
        "error": level_table(results, "error", ".3f"),
        "gradient": level_table(results, "gradient", ".2g"),
        "scores": score_table(results),
    }
    text = page.read_text()
    for name, rows in tables.items():
        head, found, rest = text.partition(f"<!-- {name} -->")
        if found:
            text = "\n".join([head + found, "", *rows, "", "<!-- end -->"]) + rest.partition("<!-- end -->")[2]
    replace_text(page, text)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="iddpm.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of the runs; an interrupted command in it is resumed")
    names = [probe.name for probe in PROBES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PROBE", help=", ".join(names))
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts per probe")
    given = parser.parse_args(arguments)
    if given.prompts < 1:
        parser.error("--prompts must be above 0")
    try:
        probes = Findings(given.run_dir, given.prompts)
        for probe in PROBES:
            if probe.name in given.only:
                probes.run(probe)
                write_page(probes.folder, PAGE)
    except (findings.Interrupted, KeyboardInterrupt):
        print("stopped and saved; run the same command again to resume", file=sys.stderr)
        return findings.INTERRUPTED
    except (ConfigError, DataError, RunEnded) as error:
        print(f"iddpm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
