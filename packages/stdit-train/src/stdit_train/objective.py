"""One training loss for a micro-batch: noise the latents, ask the model, score its answer.

b samples, C channels, T frames, H W latent height and width.
"""

import torch
from torch import Tensor

from stdit_model import STDiT
from stdit_model.diffusion import (
    NUM_TIMESTEPS,
    add_noise,
    flow_interpolate,
    flow_loss,
    iddpm_loss,
    shift_sigma,
)
from stdit_train.config import ObjectiveConfig


def training_loss(
    model: STDiT,
    config: ObjectiveConfig,
    x0: Tensor,
    noise: Tensor,
    level: Tensor,
    y: Tensor,
    mask: Tensor,
    drop: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss terms, each [b].

    Args:
        model: called once.
        config: which objective.
        x0, noise: [b, C, T, H, W].
        level: [b] uniform in 0..1, becomes the timestep.
        y, mask: text-encoder states [b, L, Dc] and mask [b, L].
        drop: [b] bool, captions to swap for the null caption; it keeps the caption's mask (Open-Sora 1.0).
    """
    if drop is not None:
        y = torch.where(drop[:, None, None], model.null_caption(*y.shape[:2]).to(y), y)
    if config.name == "flow":
        sigma = shift_sigma(level, config.shift)
        output = model(flow_interpolate(x0, noise, sigma), sigma * NUM_TIMESTEPS, y, mask)
        return flow_loss(output, x0, noise)
    timestep = (level * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
    output = model(add_noise(x0, noise, timestep), timestep, y, mask)
    return iddpm_loss(output, x0, noise, timestep)
