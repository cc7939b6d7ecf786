"""Export a run's checkpoint as a pipeline folder, or as an adapter."""

import copy

from stdit_train.checkpoint.run_folder import RunFolder, stage_folders
from stdit_train.checkpoint.verify import CheckpointError, checkpoint_name, verify
from stdit_train.config.load import from_dict
from stdit_train.errors import ConfigError


def export_run(
    run: RunFolder, out: RunFolder, *, raw: bool = False, step: int | None = None, half: bool = False
) -> int:
    """Write a checkpoint as a pipeline folder, with VAE and text encoder, and the run's sizes as defaults.

    Of a run that trains an adapter, the adapter alone is written, as a file in the folder.

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
    if config.network == "vae":
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

    import torch  # and what imports it: a run that is refused has no need of it

    from stdit_model.video_vae import latent_channels
    from stdit_train.adapters import build_partial, copy_trained, in_float32, save_adapter
    from stdit_train.checkpoint.format import load_weights
    from stdit_train.components.load import load_components
    from stdit_train.distributed.parallelize import build_model
    from stdit_train.pipeline.save import save_pipeline

    parts = load_components(config.data.vae, config.data.text_encoder, torch.device("cpu"), "fp32")
    sizes = latent_channels(parts.vae), parts.text_encoder.config.d_model
    if config.partial:
        model, digest = build_partial(config, *sizes)
        if run.metadata().get("frozen_sha256", digest) != digest:
            raise ConfigError(
                f"the weights of {config.init} are others than when {run.path} began: put the old ones back"
            )
        average = copy_trained(model)
    else:
        model = build_model(config, *sizes)
        average = copy.deepcopy(model)
    load_weights(checkpoint, model, average)
    chosen = model if raw else average
    chosen = chosen.to(torch.bfloat16) if half else in_float32(chosen)
    if config.lora.rank is not None:
        save_adapter(out.path, chosen)
    else:
        out.path.parent.mkdir(parents=True, exist_ok=True)
        save_pipeline(out.path, chosen.requires_grad_(False), parts, config)
    return int(checkpoint.state["step"])
