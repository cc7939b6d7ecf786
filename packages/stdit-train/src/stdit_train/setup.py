"""From a configuration to a trainer: device, components, model, clips."""

from dataclasses import replace
from typing import Any

import torch

from stdit_data.clip import ClipDataset
from stdit_data.latents import LatentDataset
from stdit_data.shapes import ShapesDataset, triples
from stdit_model import STDiT
from stdit_train.cached import cached_prompts, check_components, is_cached, open_cached, validation_of
from stdit_train.cached_texts import open_components
from stdit_train.components import Components
from stdit_train.config import TrainConfig
from stdit_train.device import find_device
from stdit_train.estimate import model_arguments
from stdit_train.initial import load_initial
from stdit_train.noisy_captions import NoisyCaptions
from stdit_train.run_folder import RunFolder
from stdit_train.trainer import Trainer
from stdit_train.watching import Watcher

SAMPLED_PROMPTS = 4  # drawn along the way


def build_model(config: TrainConfig, latent_channels: int, caption_channels: int) -> STDiT:
    """The transformer of a run, initialised from (seed), its channels those of the VAE and the text encoder."""
    torch.manual_seed(config.seed)
    return STDiT(**model_arguments(config, latent_channels, caption_channels))


def build_datasets(config: TrainConfig) -> tuple[ClipDataset, ClipDataset | None, list[str]]:
    """Clips to train on, clips to validate on (`shapes` alone has them), and prompts to sample along the way."""
    data = config.data
    if is_cached(config):
        cached = open_cached(config)
        return cached, validation_of(cached, config), cached_prompts(cached, SAMPLED_PROMPTS)
    if data.source == "shapes":
        size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}
        train: ClipDataset = ShapesDataset(length=data.clips, seed=config.seed, **size)
        if data.caption_noise:
            train = NoisyCaptions(train, data.caption_noise, config.seed)
        validation = ShapesDataset(split="val", length=64, **size)
        seen, held_out = triples("train"), triples("heldout")
        shown = [seen[0], seen[100], held_out[5], held_out[17]]
        return train, validation, [triple.captions()[0] for triple in shown]
    from stdit_train.videos import open_clips

    videos = open_clips(data)
    captions = [entry.caption for entry in videos.entries if entry.caption][:SAMPLED_PROMPTS]
    return videos, None, captions or [""]


def build_trainer(
    config: TrainConfig, run: RunFolder, watcher: Watcher, components: Components | None = None
) -> Trainer:
    """Everything a run needs, on the best device here. The run's folder must exist."""
    device = find_device()
    dataset, validation, prompts = build_datasets(config)
    if components is None:
        components = open_components(config, dataset, validation, prompts, device)
    if isinstance(dataset, LatentDataset):
        check_components(dataset, components)
    model = build_model(config, components.vae.config.latent_channels, components.caption_channels)
    if config.init is not None:
        watcher.said(load_initial(model, config.init))
    return Trainer(config, run, model.to(device), components, dataset, validation, prompts, device, watcher)


def open_trainer(
    config: TrainConfig,
    fitted: TrainConfig,
    run: RunFolder,
    watcher: Watcher,
    components: Components | None = None,
    previous: RunFolder | None = None,
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

    Raises:
        ConfigError: settings, components, weights or checkpoints that don't fit.
    """
    begun = run.config_file.exists()
    if not begun:
        run.check_free()
    micro_batch = run.notes().get("micro_batch", fitted.micro_batch) if begun else fitted.micro_batch
    if config.micro_batch is None:
        fitted = replace(fitted, micro_batch=micro_batch)
    checkpoint = run.latest_checkpoint(watcher.said) if begun else None
    initial = config.init if checkpoint is None else None
    trainer = build_trainer(replace(fitted, init=initial), run, watcher, components)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        watcher.said(f"going on from {checkpoint}")
    elif previous is not None:
        trainer.hand_on(previous)
        watcher.said(f"starting with the weights of {previous.path}")
    if begun:
        run.write_config(config)
        if checkpoint is None:
            watcher.said(f"{run.path} has no checkpoint yet: from the beginning")
    else:
        run.create(config)
    run.note(micro_batch=fitted.micro_batch)
    return trainer
