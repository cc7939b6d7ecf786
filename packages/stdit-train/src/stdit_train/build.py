"""Build the trainer of a run that is new, resumed, or starts from the weights of another run."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version

import torch

from stdit_data.clip import ClipDataset
from stdit_data.datasets.videos import VideoDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_data.manifests.metadata import Lengths
from stdit_model.video_vae import latent_channels
from stdit_train.adapters import build_partial
from stdit_train.assets import resolve_source
from stdit_train.callbacks import Callback
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.checkpoint.shared import check_shared
from stdit_train.checkpoint.verify import Checkpoint
from stdit_train.components.load import (
    Components,
    check_components,
    open_components,
)
from stdit_train.config.load import flatten, has_settings, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets
from stdit_train.data.holdout import ValidationClips, validation_captions
from stdit_train.distributed.agreement import check_agreement
from stdit_train.distributed.parallelize import build_model
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError
from stdit_train.hardware import keep_freed_memory
from stdit_train.task import PartialTask, STDiTTask
from stdit_train.tracking.run_log import RunLog
from stdit_train.trainer import Trainer
from stdit_train.vae.networks import build_networks
from stdit_train.vae.vae_task import VaeTask

log = logging.getLogger(__name__)


def open_trainer(
    config: TrainConfig,
    fitted: TrainConfig,
    run: RunFolder,
    callback: Callback,
    components: Components | None = None,
    previous: RunFolder | None = None,
    world: World | None = None,
) -> Trainer:
    """Return the trainer of a new run, or of one that resumes from its newest whole checkpoint if it has one.

    Every process of the run must call this; rank 0 writes.

    Args:
        config: settings as asked for, which are saved in the run's folder.
        fitted: the same with the micro-batch that fits here. A run that resumes keeps its own, so that its sums are
            rounded as before.
        run: folder of the run; created if it is new.
        callback: called as the run proceeds.
        components: VAE and text encoder. [default: loaded as `config` says]
        previous: run with the weights and average that a new one starts from.
        world: processes of the run. [default: this one]

    Raises:
        ConfigError: settings, components, weights or checkpoints do not fit; or the processes do not share the folder,
            or differ in their settings or clips.
        FolderInUseError: another run holds the folder.
    """
    world = world or World()

    def begin() -> tuple[bool, int | None, Checkpoint | None]:
        if not has_settings(run.config_file):
            run.check_free()
            return False, fitted.micro_batch, None
        return True, run.metadata().get("micro_batch", fitted.micro_batch), run.latest_checkpoint()

    def record() -> None:
        if begun:
            run.write_config(config)
        else:
            run.create(config)
        frozen = {} if (digest := _frozen_sha256(trainer)) is None else {"frozen_sha256": digest}
        run.update_metadata(micro_batch=fitted.micro_batch, **frozen)

    with RunLog(run) if world.is_main else nullcontext():
        check_shared(world, run.path)
        begun, micro_batch, checkpoint = world.broadcast_from_main(begin)
        if config.micro_batch is None:
            fitted = replace(fitted, micro_batch=micro_batch)
        initial = config.init if checkpoint is None or config.partial else None
        trainer = build_trainer(replace(fitted, init=initial), run, callback, components, world)
        if checkpoint is not None:
            _check_frozen(trainer, run)
            trainer.resume(checkpoint)
            log.info("resuming from %s", checkpoint.path)
        elif previous is not None:
            trainer.init_from_run(previous)
            log.info("starting from the weights of %s", previous.path)
        check_agreement(world, _to_agree_on(config, trainer))
        if begun and checkpoint is None:
            log.info("%s has no checkpoint yet: starting from the beginning", run.path)
        world.broadcast_from_main(record)
    return trainer


def build_trainer(
    config: TrainConfig,
    run: RunFolder,
    callback: Callback,
    components: Components | None = None,
    world: World | None = None,
) -> Trainer:
    """Build the trainer of a new run on the best device here.

    Args:
        config: settings of the run.
        run: folder of the run, which must exist when training begins.
        callback: called as the run proceeds.
        components: VAE and text encoder. [default: loaded as `config` says]
        world: processes of the run, without a mesh. [default: this one]

    Raises:
        ConfigError: settings, components or weights do not fit.
    """
    world = (world or World()).with_mesh(config)
    device = world.device()
    if device.type == "cpu":
        keep_freed_memory()
    dataset, validation, prompts = build_datasets(config, world)
    if config.network == "vae":
        return _build_vae_trainer(config, run, callback, dataset, validation, device, world)
    if components is None:
        captions = [*prompts, *validation_captions(validation)]
        components = open_components(config, dataset, captions, device)
    log.info(_about_validation(validation))
    for clips in (dataset, validation.dataset if isinstance(validation, ValidationClips) else None):
        if isinstance(clips, LatentDataset):
            check_components(clips, components)
    sizes = latent_channels(components.vae), components.caption_channels
    task: STDiTTask
    if config.partial:
        model, digest = build_partial(config, *sizes)
        task = PartialTask(config, model.to(device), components, prompts, device, world, digest)
    else:
        model = build_model(config, *sizes, world)
        if config.init is not None:
            log.info(load_initial(model, resolve_source(config.init)))
        task = STDiTTask(config, model, components, prompts, device, world)
    return Trainer(config, run, task, dataset, validation, device, callback, world)


def _build_vae_trainer(
    config: TrainConfig,
    run: RunFolder,
    callback: Callback,
    dataset: ClipDataset,
    validation: ClipDataset | None,
    device: torch.device,
    world: World,
) -> Trainer:
    if config.vae.kind == "video" and isinstance(dataset, VideoDataset) and Lengths(dataset.entries).pictures.all():
        raise ConfigError(
            f"{config.data.source} has pictures alone, and a video VAE needs clips: give videos with --data, or train "
            "an image VAE (vae.kind=image)"
        )
    networks, about = build_networks(config, device)
    for line in (_about_validation(validation), about):
        if line is not None:
            log.info(line)
    task = VaeTask(config, networks, validation or dataset, device, world)
    return Trainer(config, run, task, dataset, validation, device, callback, world)


def _to_agree_on(config: TrainConfig, trainer: Trainer) -> dict[str, object]:
    """Return what all processes of a run must agree on before its first step, by a name for people."""
    settings = {f"the setting {key}": value for key, value in flatten(to_dict(config)).items()}
    dataset, loader = trainer.loader.dataset, trainer.loader.state_dict()
    return settings | {
        "the version of stdit-train": version("stdit-train"),
        "the number of clips": loader["samples"],
        "the list of clips (identity)": getattr(dataset, "identity", None),
        "the order of the clips (fingerprint)": loader["fingerprint"],
        "the position in the clips": trainer.loader.position,
        "the list of validation clips (identity)": getattr(trainer.outputs.validation, "identity", None),
        "the step": trainer.step,
        "the micro-batch": trainer.config.micro_batch,
        "the frozen weights (SHA-256)": _frozen_sha256(trainer),
    }


def _frozen_sha256(trainer: Trainer) -> str | None:
    """Return the SHA-256 of the weights that a part is trained of; None if all are trained."""
    return trainer.task.digest if isinstance(trainer.task, PartialTask) else None


def _check_frozen(trainer: Trainer, run: RunFolder) -> None:
    """Check that a run that resumes has the frozen weights that it began with, which its checkpoints lack.

    Raises:
        ConfigError: they are others.
    """
    before, now = run.metadata().get("frozen_sha256"), _frozen_sha256(trainer)
    if before is not None and before != now:
        raise ConfigError(
            f"the weights of {trainer.config.init} are others than when {run.path} began, and its checkpoints hold the "
            "trained part alone: put the old ones back, or start a new run"
        )


def _about_validation(validation: ClipDataset | None) -> str:
    if validation is None:
        return "no validation set (e.g. --set data.validation=0.02 holds out 2 %)"
    return f"validation: {len(validation)} held-out clips"
