"""The same data, noise, timesteps and steps for every variant: what differs is the architecture alone.

Each variant-seed is a run folder of its own, so that an interrupted ablation goes on where it was.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stdit_model import STDiT
from stdit_model.blocks import VARIANTS, Variant
from stdit_train.checkpoint import list_checkpoints
from stdit_train.components import Components, load_components
from stdit_train.config import ConfigError, TrainConfig, from_dict, set_values, to_dict
from stdit_train.device import find_device
from stdit_train.estimate import estimate_run
from stdit_train.metrics import read_metrics
from stdit_train.run_folder import RunFolder
from stdit_train.setup import build_datasets, build_model
from stdit_train.trainer import Trainer, Watcher


@dataclass(frozen=True)
class Result:
    """One finished run."""

    variant: str
    seed: int
    parameters: int
    step_flops: int
    seconds_per_step: float
    validation_loss: float
    curve: list[tuple[int, float]]  # (step, validation loss)


def parse_variants(text: str) -> list[Variant]:
    """A comma-separated list of variants.

    Raises:
        ConfigError: one that does not exist, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}: choose from {', '.join(VARIANTS)}")
    if not names:
        raise ConfigError(f"no variants given: choose from {', '.join(VARIANTS)}")
    return [variant for variant in VARIANTS if variant in names]


def ablate(
    config: TrainConfig,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    watch: Callable[[str, int], Watcher],
) -> tuple[list[Result], bool]:
    """Train every variant with every seed, whichever are not done yet.

    Args:
        config: of the runs; variant and seed are set for each.
        variants, seeds: what to compare.
        folder: of all the runs.
        watch: gives the watcher of a run.

    Returns:
        The results so far, and whether all runs are done (an interruption ends it early).

    Raises:
        ConfigError: the folder holds runs with other settings.
    """
    device = find_device()
    components: Components | None = None
    results: list[Result] = []
    for seed in seeds:
        for variant in variants:
            run = RunFolder(folder / f"{variant}-seed{seed}")
            own = from_dict(set_values(to_dict(config), {"model.variant": variant, "seed": seed}))
            if not is_finished(run, own):
                if components is None:
                    components = load_components(config.data.vae, config.data.text_encoder, device, config.precision)
                if not _train(own, run, components, watch(variant, seed)):
                    return results, False
            results.append(read_result(run, own))
    return results, True


def _train(config: TrainConfig, run: RunFolder, components: Components, watcher: Watcher) -> bool:
    """One run, from its last checkpoint where it has one; whether it came to its end."""
    device = find_device()
    dataset, validation, prompts = build_datasets(config)
    model = shared_start(config, components).to(device)
    trainer = Trainer(config, run, model, components, dataset, validation, prompts, device, watcher)
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif not run.config_file.exists():
        run.create(config)
    return trainer.train().finished


def shared_start(config: TrainConfig, components: Components) -> STDiT:
    """A model whose parameters equal those of every other variant of this seed wherever they have the same name.

    seq has every parameter that any variant has, so all are copied from a seq model.
    """
    sizes = components.vae.config.latent_channels, components.text_encoder.config.d_model
    model = build_model(config, *sizes)
    reference = build_model(replace(config, model=replace(config.model, variant="seq")), *sizes).state_dict()
    model.load_state_dict({name: reference[name] for name in model.state_dict()})
    return model


def is_finished(run: RunFolder, config: TrainConfig) -> bool:
    """Whether a run folder holds this run, done.

    Raises:
        ConfigError: it holds a run with other settings.
    """
    if not run.config_file.exists():
        return False
    saved = from_dict(run.read_config())
    if saved != config:
        theirs, ours = to_dict(saved), to_dict(config)
        key = next(key for key in ours if ours[key] != theirs[key])
        raise ConfigError(
            f"{run.path} holds a run with other settings ({key}: {theirs[key]}, now {ours[key]}): "
            "choose another folder with --out"
        )
    finished = [path for path in list_checkpoints(run.checkpoints) if path.name == f"step-{config.steps:06d}"]
    return bool(finished) and (run.pipeline / "model_index.json").exists()


def read_result(run: RunFolder, config: TrainConfig) -> Result:
    """What a finished run came to; the step time is the median over its logged steps."""
    rows = read_metrics(run.metrics_file)
    curve = [(int(row["step"]), row["validation_loss"]) for row in rows if "validation_loss" in row]
    rates = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
    estimate = estimate_run(replace(config, micro_batch=config.micro_batch or config.global_batch))
    return Result(
        variant=config.model.variant,
        seed=config.seed,
        parameters=estimate.parameters,
        step_flops=estimate.step_flops,
        seconds_per_step=config.global_batch / statistics.median(rates),
        validation_loss=curve[-1][1],
        curve=curve,
    )


def write_csv(results: Sequence[Result], file: Path) -> None:
    """One line a run."""
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["variant", "seed", "parameters", "flops_per_step", "seconds_per_step", "validation_loss"])
        for r in results:
            measured = f"{r.seconds_per_step:.4f}", f"{r.validation_loss:.5f}"
            writer.writerow((r.variant, r.seed, r.parameters, r.step_flops, *measured))
