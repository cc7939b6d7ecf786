"""From a configuration to a trainer: device, components, model, clips."""

from dataclasses import replace
from pathlib import Path

from stdit_data.clip import ClipDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_train.callbacks import Callback, NullCallback
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components, check_components, open_components
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets
from stdit_train.data.holdout import ValidationClips, validation_captions
from stdit_train.distributed.parallelize import build_model
from stdit_train.distributed.world import World
from stdit_train.trainer import Trainer


def build_trainer(
    config: TrainConfig,
    run: RunFolder,
    watcher: Callback,
    components: Components | None = None,
    world: World | None = None,
) -> Trainer:
    """Everything a run needs, on the best device here. The run's folder must exist.

    Args:
        config: of the run.
        run: its folder.
        watcher: told what happens.
        components: VAE and text encoder; loaded unless given.
        world: Processes of the run. [default: this one]

    Raises:
        ConfigError: what does not fit.
    """
    world = (world or World()).with_mesh(config)
    device = world.device()
    dataset, validation, prompts = build_datasets(config)
    if components is None:
        captions = [*prompts, *validation_captions(validation)]
        components = open_components(config, dataset, captions, device)
    watcher.said(_about(validation))
    for clips in (dataset, validation.dataset if isinstance(validation, ValidationClips) else None):
        if isinstance(clips, LatentDataset):
            check_components(clips, components)
    model = build_model(config, components.vae.config.latent_channels, components.caption_channels, world)
    if config.init is not None:
        line = load_initial(model, config.init)
        watcher.said(line)
    return Trainer(config, run, model, components, dataset, validation, prompts, device, watcher, world)


def _about(validation: ClipDataset | None) -> str:
    """What a run is validated on, as a line."""
    if validation is None:
        return "no validation loss: --set data.validation=0.02, say, would keep that share of the videos for it"
    return f"validation loss: of {len(validation)} clips that are not trained on"


def open_trainer(
    config: TrainConfig,
    fitted: TrainConfig,
    run: RunFolder,
    watcher: Callback,
    components: Components | None = None,
    previous: RunFolder | None = None,
    world: World | None = None,
) -> Trainer:
    """The trainer of a new run, or of one that goes on from its last whole checkpoint, or from nothing if it has none.

    Args:
        config: as asked for; saved in the run's folder.
        fitted: with the micro-batch that fits here; a run that goes on keeps the one it began with, so that its sums
            are rounded as before.
        run: its folder.
        watcher: told what happens.
        components: VAE and text encoder; loaded unless given.
        previous: the run whose weights and average a new one starts with.
        world: Processes of the run. [default: this one]

    Raises:
        ConfigError: settings, components, weights or checkpoints that don't fit.
    """
    world = world or World()
    watcher = watcher if world.is_main else NullCallback()

    def begin() -> tuple[bool, int | None, Path | None]:
        if not run.config_file.exists():
            run.check_free()
            return False, fitted.micro_batch, None
        return True, run.notes().get("micro_batch", fitted.micro_batch), run.latest_checkpoint(watcher.said)

    begun, micro_batch, checkpoint = world.broadcast_from_main(begin)
    if config.micro_batch is None:
        fitted = replace(fitted, micro_batch=micro_batch)
    initial = config.init if checkpoint is None else None
    trainer = build_trainer(replace(fitted, init=initial), run, watcher, components, world)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        watcher.said(f"going on from {checkpoint}")
    elif previous is not None:
        trainer.init_from_run(previous)
        watcher.said(f"starting with the weights of {previous.path}")
    if begun and checkpoint is None:
        watcher.said(f"{run.path} has no checkpoint yet: from the beginning")

    def record() -> None:
        if begun:
            run.write_config(config)
        else:
            run.create(config)
        run.note(micro_batch=fitted.micro_batch)

    world.broadcast_from_main(record)
    return trainer
