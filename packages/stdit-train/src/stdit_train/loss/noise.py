"""What is random about a training sample, from (seed, epoch, index) alone: any number of ranks draws the same."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of a micro-batch of b samples."""

    posterior: Tensor  # [b, C, T, H, W], the VAE's
    noise: Tensor  # [b, C, T, H, W], the diffusion's
    level: Tensor  # [b], uniform in 0..1: the timestep
    drop: Tensor  # [b], uniform in 0..1: the caption is dropped below the set share
    given: Tensor  # [b, 2], uniform in 0..1: first frames are given below the set share; and how many


def draw(seed: int, epoch: int, indices: list[int], shape: tuple[int, ...]) -> Draws:
    """The draws of samples `indices` in an epoch, for latents of `shape` [C, T, H, W]; on the CPU, float32."""
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
