"""One training loss for a micro-batch: noise the latents, ask the model, score its answer.

b samples, C channels, T frames, H W latent height and width.
"""

import torch
from torch import Tensor

from stdit_model import STDiT
from stdit_model.diffusion import (
    NUM_TIMESTEPS,
    RESAMPLING_SHARE,
    NoiseLevel,
    add_noise,
    flow_interpolate,
    flow_loss,
    iddpm_loss,
    shift_sigma,
)
from stdit_train.config.schema import ObjectiveConfig


def timestep_density(level: Tensor, config: ObjectiveConfig) -> Tensor:
    """Uniform numbers in 0..1 to the levels that a run trains on: as they are, or logit-normal.

    Logit-normal (Esser et al. 2024, section 3.1): the logistic function of a normal number with mean and standard
    deviation as set, so that the middle of the path is seen more often than its ends.
    """
    if config.timesteps == "uniform":
        return level
    return torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(level))


def timestep_of(level: Tensor, config: ObjectiveConfig) -> Tensor:
    """The timestep in 0..1000 that a level stands for."""
    return NUM_TIMESTEPS * (shift_sigma(level, config.shift) if config.name == "flow" else level)


def min_snr_weight(timestep: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR, the weight of epsilon's error under min-SNR (Hang et al. 2023, eq. 5 and table 1): [b].

    Args:
        timestep: [b] integers in 0..999; SNR is alpha_bar / (1 - alpha_bar) there.
        gamma: signal-to-noise ratio from which on steps count less; 5 in the paper.
    """
    one, zero = torch.ones(len(timestep), 1, 1, 1, 1, device=timestep.device), torch.zeros((), device=timestep.device)
    snr = ((add_noise(one, zero, timestep) / add_noise(zero, one, timestep)) ** 2).flatten()
    return snr.clamp(max=gamma) / snr


def given_frames(draws: Tensor, share: float, frames: int) -> Tensor:
    """Which frames are given, [b, T] bool: in a share of the clips the first ones, as many as you like but all.

    Args:
        draws: [b, 2], uniform in 0..1: whether, and how many.
        share: of the clips.
        frames: T.
    """
    count_b = (1 + (draws[:, 1] * (frames - 1)).long()).clamp(max=frames - 1)
    count_b = torch.where(draws[:, 0] < share, count_b, 0)
    return torch.arange(frames) < count_b[:, None]


def show_given(x_t: Tensor, x0: Tensor, noise: Tensor, level: NoiseLevel, given: Tensor) -> Tensor:
    """Noisy latents with the given frames as a sampler shows them: under a small share of the noise, see `given`."""
    return torch.where(given[:, None, :, None, None], level.noised(x0, noise, RESAMPLING_SHARE), x_t)


def training_loss(
    model: STDiT,
    config: ObjectiveConfig,
    x0: Tensor,
    noise: Tensor,
    level: Tensor,
    y: Tensor,
    mask: Tensor,
    drop: Tensor | None = None,
    given: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss terms, each [b].

    Args:
        model: called once.
        config: which objective.
        x0, noise: [b, C, T, H, W].
        level: [b] in 0..1, becomes the timestep (see `timestep_density`).
        y, mask: text-encoder states [b, L, Dc] and mask [b, L].
        drop: [b] bool, captions to swap for the null caption; it keeps the caption's mask (Open-Sora 1.0).
        given: [b, T] bool, frames that are shown nearly clean, to go on from; they count for nothing.
    """
    if drop is not None:
        y = torch.where(drop[:, None, None], model.null_caption(*y.shape[:2]).to(y), y)
    loss_mask = None if given is None else ~given
    if config.name == "flow":
        sigma = shift_sigma(level, config.shift)
        x_t = flow_interpolate(x0, noise, sigma)
        if given is not None:
            x_t = show_given(x_t, x0, noise, NoiseLevel.of_flow(sigma), given)
        return flow_loss(model(x_t, sigma * NUM_TIMESTEPS, y, mask), x0, noise, loss_mask)
    timestep = (level * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
    x_t = add_noise(x0, noise, timestep)
    if given is not None:
        x_t = show_given(x_t, x0, noise, NoiseLevel.of_iddpm(timestep), given)
    terms = iddpm_loss(model(x_t, timestep, y, mask), x0, noise, timestep, loss_mask)
    if config.min_snr is not None:
        terms["loss"] = min_snr_weight(timestep, config.min_snr) * terms["mse"] + terms["vb"]
    return terms
