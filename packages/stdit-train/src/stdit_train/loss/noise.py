"""The random numbers of a training sample, from (seed, epoch, index) alone, so that any world size draws the same."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of a micro-batch of b samples.

    Attributes:
        posterior: [b, C, T, H, W], normal: sample of the VAE's posterior.
        noise: [b, C, T, H, W], normal: noise of the diffusion.
        level: [b], uniform in 0..1: timestep.
        drop: [b], uniform in 0..1: the caption is dropped below `caption_dropout`.
        given: [b, 2], uniform in 0..1: whether the first frames condition the others, and how many.
    """

    posterior: Tensor
    noise: Tensor
    level: Tensor
    drop: Tensor
    given: Tensor


def draw(seed: int, epoch: int, indices: list[int], shape: tuple[int, ...]) -> Draws:
    """Draw the random numbers of samples in an epoch, in float32 on the CPU.

    Args:
        seed: seed of the run.
        epoch: epoch.
        indices: samples.
        shape: shape [C, T, H, W] of their latents.
    """
    posterior, noise, uniform, given = [], [], [], []
    for index in indices:
        entropy = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
        uniform.append(torch.rand(2, generator=generator))
        posterior.append(torch.randn(shape, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        given.append(torch.rand(2, generator=generator))
    level, drop = torch.stack(uniform).unbind(1)
    return Draws(torch.stack(posterior), torch.stack(noise), level, drop, torch.stack(given))
