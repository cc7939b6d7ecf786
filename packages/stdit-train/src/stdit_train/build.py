"""From a configuration to a trainer: device, components, model, clips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stdit_data.clip import ClipDataset
from stdit_data.datasets.shapes import ShapesDataset, triples
from stdit_data.latents.dataset import LatentDataset
from stdit_model import STDiT
from stdit_train.cached_texts import open_components
from stdit_train.callbacks import Unwatched, Watcher
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components
from stdit_train.config.load import TrainConfig
from stdit_train.data.cached import (
    cached_prompts,
    check_components,
    is_cached,
    is_of_shapes,
    open_cached,
    validation_of_shapes,
)
from stdit_train.data.holdout import parted
from stdit_train.data.videos import open_clips
from stdit_train.distributed.world import Processes
from stdit_train.estimate.training import model_arguments
from stdit_train.loss.validation import ValidationClips
from stdit_train.noisy_captions import NoisyCaptions
from stdit_train.trainer import Trainer

SAMPLED_PROMPTS = 4  # drawn along the way


def build_model(config: TrainConfig, latent_channels: int, caption_channels: int) -> STDiT:
    """The transformer of a run, initialised from (seed), its channels those of the VAE and the text encoder."""
    torch.manual_seed(config.seed)
    return STDiT(**model_arguments(config, latent_channels, caption_channels))


def build_datasets(config: TrainConfig) -> tuple[ClipDataset, ClipDataset | None, list[str]]:
    """Clips to train on, clips to validate on (None for none), and prompts to sample along the way.

    Raises:
        ConfigError, DataError: no such clips, or settings that don't fit them.
    """
    data = config.data
    if is_cached(config):
        cached = open_cached(config)
        if is_of_shapes(cached):
            return cached, validation_of_shapes(config), cached_prompts(cached, SAMPLED_PROMPTS)
        encoded, held = parted(cached, data)
        return encoded, held, cached_prompts(encoded, SAMPLED_PROMPTS)
    if data.source == "shapes":
        size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}
        train: ClipDataset = ShapesDataset(
            length=data.clips, seed=config.seed, spread=data.spread, later=data.later, **size
        )
        if data.caption_noise:
            train = NoisyCaptions(train, data.caption_noise, config.seed)
        validation = ShapesDataset(split="val", length=64, spread=data.spread, **size)
        seen, held_out = triples("train"), triples("heldout")
        shown = [seen[0], seen[100], held_out[5], held_out[17]]
        return train, validation, [triple.captions()[0] for triple in shown]
    videos, held = parted(open_clips(data), data)
    captions = [entry.caption for entry in videos.entries if entry.caption][:SAMPLED_PROMPTS]
    return videos, held, captions or [""]


def build_trainer(
    config: TrainConfig,
    run: RunFolder,
    watcher: Watcher,
    components: Components | None = None,
    processes: Processes | None = None,
) -> Trainer:
    """Everything a run needs, on the best device here. The run's folder must exist.

    Args:
        config: of the run.
        run: its folder.
        watcher: told what happens.
        components: VAE and text encoder; loaded unless given.
        processes: that train together (`stdit_train.distributed._distributed.join`); this one unless given.

    Raises:
        ConfigError: what does not fit.
    """
    processes = (processes or Processes()).grouped(config)
    device = processes.device()
    dataset, validation, prompts = build_datasets(config)
    if components is None:
        components = open_components(config, dataset, validation, prompts, device)
    watcher.said(_about(validation))
    for clips in (dataset, validation.dataset if isinstance(validation, ValidationClips) else None):
        if isinstance(clips, LatentDataset):
            check_components(clips, components)
    arguments = model_arguments(config, components.vae.config.latent_channels, components.caption_channels)
    model = processes.model(arguments, config)
    if config.init is not None:
        line = load_initial(model, config.init)
        watcher.said(line)
    return Trainer(config, run, model, components, dataset, validation, prompts, device, watcher, processes)


def _about(validation: ClipDataset | None) -> str:
    """What a run is validated on, as a line."""
    if validation is None:
        return "no validation loss: --set data.validation=0.02, say, would keep that share of the videos for it"
    return f"validation loss: of {len(validation)} clips that are not trained on"


def open_trainer(
    config: TrainConfig,
    fitted: TrainConfig,
    run: RunFolder,
    watcher: Watcher,
    components: Components | None = None,
    previous: RunFolder | None = None,
    processes: Processes | None = None,
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
        processes: that train together; this one unless given. All call this, and the first writes.

    Raises:
        ConfigError: settings, components, weights or checkpoints that don't fit.
    """
    processes = processes or Processes()
    watcher = watcher if processes.first else Unwatched()

    def begin() -> tuple[bool, int | None, Path | None]:
        if not run.config_file.exists():
            run.check_free()
            return False, fitted.micro_batch, None
        return True, run.notes().get("micro_batch", fitted.micro_batch), run.latest_checkpoint(watcher.said)

    begun, micro_batch, checkpoint = processes.decided(begin)
    if config.micro_batch is None:
        fitted = replace(fitted, micro_batch=micro_batch)
    initial = config.init if checkpoint is None else None
    trainer = build_trainer(replace(fitted, init=initial), run, watcher, components, processes)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        watcher.said(f"going on from {checkpoint}")
    elif previous is not None:
        trainer.hand_on(previous)
        watcher.said(f"starting with the weights of {previous.path}")
    if begun and checkpoint is None:
        watcher.said(f"{run.path} has no checkpoint yet: from the beginning")

    def record() -> None:
        if begun:
            run.write_config(config)
        else:
            run.create(config)
        run.note(micro_batch=fitted.micro_batch)

    processes.decided(record)
    return trainer
