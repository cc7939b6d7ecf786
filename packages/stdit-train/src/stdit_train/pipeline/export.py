"""Export a run's checkpoint as a pipeline folder."""

import torch

from stdit_model.video_vae import latent_channels
from stdit_train.checkpoint.format import load_weights
from stdit_train.checkpoint.run_folder import RunFolder, stage_folders
from stdit_train.checkpoint.verify import CheckpointError, checkpoint_name, verify
from stdit_train.components.load import load_components
from stdit_train.config.load import from_dict
from stdit_train.distributed.parallelize import build_model
from stdit_train.errors import ConfigError
from stdit_train.optim.ema import Ema
from stdit_train.pipeline.save import save_pipeline


def export_run(
    run: RunFolder, out: RunFolder, *, raw: bool = False, step: int | None = None, half: bool = False
) -> int:
    """Write a checkpoint as a pipeline folder, with VAE and text encoder, and the run's sizes as defaults.

    Args:
        run: the run; a schedule's folder stands for the last of its stages that has a checkpoint.
        out: folder to write to, which must be empty or not exist; only its path is used.
        raw: export the raw weights instead of the EMA.
        step: step of the checkpoint; the newest complete one unless given.
        half: store the transformer in bfloat16.

    Returns:
        The checkpoint's step.

    Raises:
        ConfigError: the run or checkpoint does not exist, or `out` is not empty.
        CheckpointError: the checkpoint is damaged.
    """
    stages = [RunFolder(path) for path in stage_folders(run.path)]
    run = next((stage for stage in reversed(stages) if any(stage.checkpoints.glob("step-*"))), (stages or [run])[-1])
    config = from_dict(run.read_config())
    if config.trains == "vae":
        raise ConfigError(f"{run.path} trains a VAE, not a pipeline: the VAE is in {run.vae} when the run has ended")
    if out.path.exists() and (not out.path.is_dir() or any(out.path.iterdir())):
        raise ConfigError(f"{out.path} is not empty: choose another folder to export to")
    if step is not None and not (run.checkpoints / checkpoint_name(step)).is_dir():
        there = ", ".join(path.name[5:].lstrip("0") for path in sorted(run.checkpoints.glob("step-*"))) or "none"
        raise CheckpointError(f"{run.path} has no checkpoint of step {step}; there are {there}")
    named = None if step is None else run.checkpoints / checkpoint_name(step)
    checkpoint = run.latest_checkpoint() if named is None else verify(named, run.id)
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no checkpoint to export yet; `stdit train --resume {run.path}` resumes it")
    parts = load_components(config.data.vae, config.data.text_encoder, torch.device("cpu"), "fp32")
    model = build_model(config, latent_channels(parts.vae), parts.text_encoder.config.d_model)
    ema = Ema(model, config.optimizer.ema)
    load_weights(checkpoint, model, ema.model)
    chosen = model if raw else ema.model
    out.path.parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(out.path, chosen.to(torch.bfloat16) if half else chosen, parts, config)
    return int(checkpoint.state["step"])
