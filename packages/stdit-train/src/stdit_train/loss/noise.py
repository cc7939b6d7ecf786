"""The random numbers of a training sample, from (seed, epoch, index) alone, so that any world size draws the same.

The generator is counter-based (Philox; Salmon et al. 2011). Seed, epoch and index are its key and counter in full, so
no two samples share numbers. Runs begun before stdit-train 0.2 keep torch's generator, which takes 32 bits of a seed.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stdit_train.config.schema import DrawName

BITS = 24  # of a float32


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


def draw(name: DrawName, seed: int, epoch: int, indices: list[int], shape: tuple[int, ...]) -> Draws:
    """Draw the random numbers of samples in an epoch, in float32 on the CPU.

    Args:
        name: generator, as the run's settings have it.
        seed: seed of the run.
        epoch: epoch.
        indices: samples.
        shape: shape [C, T, H, W] of their latents.
    """
    draw_one = draw_philox if name == "philox" else draw_mt19937
    samples = [draw_one(seed, epoch, index, shape) for index in indices]
    return Draws(**{key: torch.stack([sample[key] for sample in samples]) for key in samples[0]})


def draw_philox(seed: int, epoch: int, index: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Draw the numbers of a sample as the fields of `Draws`, without b.

    The key is the seed, below 2^128; the high words of the counter are epoch and index. Each random word of 64 bits
    after the first four makes a number of `posterior` and one of `noise` (Box and Muller 1958).
    """
    raw = np.random.Philox(key=seed, counter=[0, 0, epoch, index]).random_raw(4 + math.prod(shape))
    words = raw.astype("<u8", copy=False).view("<u4")  # raw bits: numpy promises the same in all versions
    uniform = ((words[:4] >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)  # never 0 or 1
    whole = (words[8:] >> np.uint32(32 - BITS)).astype(np.float32)
    radius = np.sqrt(-2 * np.log((whole[0::2] + 1) * np.float32(2**-BITS)))
    angle = whole[1::2] * np.float32(2 * np.pi * 2**-BITS)
    level, drop, *given = torch.from_numpy(uniform).unbind()
    return {
        "posterior": torch.from_numpy(radius * np.cos(angle)).reshape(shape),
        "noise": torch.from_numpy(radius * np.sin(angle)).reshape(shape),
        "level": level,
        "drop": drop,
        "given": torch.stack(given),
    }


def draw_mt19937(seed: int, epoch: int, index: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Draw the numbers of a sample with torch's generator; of 300,000 samples about ten share theirs with another."""
    entropy = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
    level, drop = torch.rand(2, generator=generator)
    posterior, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    given = torch.rand(2, generator=generator)
    return {"posterior": posterior, "noise": noise, "level": level, "drop": drop, "given": given}
