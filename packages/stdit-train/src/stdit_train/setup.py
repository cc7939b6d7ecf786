"""From a configuration to a trainer: device, components, model, clips."""

from typing import Any

import torch

from stdit_data.clip import ClipDataset
from stdit_data.shapes import ShapesDataset, triples
from stdit_model import STDiT
from stdit_train.components import Components, load_components
from stdit_train.config import TrainConfig
from stdit_train.device import find_device
from stdit_train.estimate import model_arguments
from stdit_train.initial import load_initial
from stdit_train.run_folder import RunFolder
from stdit_train.trainer import Trainer, Watcher

SAMPLED_PROMPTS = 4  # drawn along the way


def build_model(config: TrainConfig, latent_channels: int, caption_channels: int) -> STDiT:
    """The transformer of a run, initialised from (seed), its channels those of the VAE and the text encoder."""
    torch.manual_seed(config.seed)
    return STDiT(**model_arguments(config, latent_channels, caption_channels))


def build_datasets(config: TrainConfig) -> tuple[ClipDataset, ClipDataset | None, list[str]]:
    """Clips to train on, clips to validate on (`shapes` alone has them), and prompts to sample along the way."""
    data = config.data
    if data.source == "shapes":
        size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}
        train = ShapesDataset(length=data.clips, seed=config.seed, **size)
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
        components = load_components(config.data.vae, config.data.text_encoder, device, config.precision)
    model = build_model(config, components.vae.config.latent_channels, components.text_encoder.config.d_model)
    if config.init is not None:
        watcher.said(load_initial(model, config.init))
    return Trainer(config, run, model.to(device), components, dataset, validation, prompts, device, watcher)
