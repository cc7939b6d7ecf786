"""The training loss of a micro-batch: add noise to the latents, predict, compare.

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
    signal_to_noise,
)
from stdit_train.config.schema import ObjectiveConfig


def timestep_density(level: Tensor, config: ObjectiveConfig) -> Tensor:
    """Map uniform numbers in 0..1 to the levels that a run trains on: unchanged, or logit-normal.

    Logit-normal (Esser et al. 2024, section 3.1): the logistic function of a normal number with mean and standard
    deviation as set, so that the middle of the path is seen more often than its ends.
    """
    if config.timesteps == "uniform":
        return level
    return torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(level))


def timestep_of(level: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return the timestep in 0..1000 of a level in 0..1."""
    return NUM_TIMESTEPS * (shift_sigma(level, config.shift) if config.name == "flow" else level)


def loss_weight(timestep: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return the weight of the squared error at timesteps of iDDPM, [b]; the variational bound has none.

    - min-SNR with gamma (Hang et al. 2023, eq. 5 and table 1): min(SNR, gamma) / SNR of an error of epsilon, and
      min(SNR, gamma) / (SNR + 1) of one of v; either is min(SNR, gamma) of the error of x0.
    - "velocity": (SNR + 1) / SNR of an error of epsilon, which makes it the error of v.

    Args:
        timestep: [b] integers in 0..999; SNR is alpha_bar / (1 - alpha_bar) there.
        config: objective.
    """
    snr = signal_to_noise(timestep, config.zero_terminal_snr)
    own = snr if config.prediction == "epsilon" else snr + 1  # an error of x0 as one of what is predicted
    if config.min_snr is not None:
        return snr.clamp(max=config.min_snr) / own
    return (snr + 1) / own if config.weighting == "velocity" else torch.ones_like(snr)


def given_frames(draws: Tensor, share: float, frames: int) -> Tensor:
    """Choose the conditioning frames, [b, T] bool: in a share of the clips the first 1 to T - 1 frames.

    Args:
        draws: [b, 2], uniform in 0..1: whether a clip has any, and how many.
        share: share of the clips that have some.
        frames: frames T of the latents.
    """
    count_b = (1 + (draws[:, 1] * (frames - 1)).long()).clamp(max=frames - 1)
    count_b = torch.where(draws[:, 0] < share, count_b, 0)
    return torch.arange(frames) < count_b[:, None]


def show_given(x_t: Tensor, x0: Tensor, noise: Tensor, level: NoiseLevel, given: Tensor) -> Tensor:
    """Replace the conditioning frames of noisy latents by nearly clean ones, as a sampler shows them.

    They keep a share `RESAMPLING_SHARE` of the noise.
    """
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
    """Compute the loss terms of a micro-batch, each [b].

    Args:
        model: predicts noise, v or velocity; called once.
        config: objective.
        x0, noise: clean latents and noise [b, C, T, H, W].
        level: [b] in 0..1, becomes the timestep (see `timestep_density`).
        y, mask: text-encoder states [b, L, Dc] and mask [b, L].
        drop: [b] bool, captions to replace by the null caption, with the caption's mask (Open-Sora 1.0).
        given: [b, T] bool, conditioning frames, shown nearly clean and left out of the loss.
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
    x_t = add_noise(x0, noise, timestep, config.zero_terminal_snr)
    if given is not None:
        at = NoiseLevel.of_iddpm(timestep, config.prediction, config.zero_terminal_snr)
        x_t = show_given(x_t, x0, noise, at, given)
    output = model(x_t, timestep, y, mask)
    terms = iddpm_loss(output, x0, noise, timestep, loss_mask, config.prediction, config.zero_terminal_snr)
    if config.weighted:
        terms["loss"] = loss_weight(timestep, config) * terms["mse"] + config.bound * terms["vb"]
    return terms
