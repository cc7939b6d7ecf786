"""Trains the demo's 2-D VAE on single frames of `shapes`: a diffusers AutoencoderKL, 8x down, 4 latent channels.

B batch, H W pixels, h w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from stdit_data.shapes import ShapesDataset


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the VAE is built and trained.

    `kl_weight` (times the KL summed over a latent) is small on purpose: at 1e-6 a latent channel collapses. Full
    frames, not crops: GroupNorm statistics of crops differ from those of frames.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 4
    norm_num_groups: int = 8
    size: int = 64
    batch: int = 8
    steps: int = 5000
    lr: float = 2e-3
    kl_weight: float = 1e-7
    seed: int = 0


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained AutoencoderKL without attention in its middle."""
    torch.manual_seed(config.seed)
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_autoencoder(config: AutoencoderConfig, on_step: Callable[[int, float], None]) -> AutoencoderKL:
    """Train on frame i of `shapes` at step i; cosine decay to zero. Returns the VAE with its latent statistics set.

    Args:
        config: sizes and schedule.
        on_step: called with (step, reconstruction error) after each step.
    """
    vae = build_autoencoder(config).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.03)
    frames = ShapesDataset(frames=1, height=config.size, width=config.size, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        x_BCHW = _frames(frames, range(step * config.batch, (step + 1) * config.batch))
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast as float32 on CPUs that have it
            posterior = vae.encode(x_BCHW).latent_dist
            reconstruction = vae.decode(posterior.sample(generator=generator)).sample
        error = F.mse_loss(reconstruction.float(), x_BCHW)
        loss = error + config.kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, error.item())
    vae.eval()
    mean, std = latent_statistics(vae, frames)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, frames: ShapesDataset, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of posterior samples over `count` frames, each [C]: what training will draw."""
    posteriors = [vae.encode(_frames(frames, range(i, i + 32))).latent_dist for i in range(0, count, 32)]
    mean = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))
    return mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + noise).sqrt()


def _frames(dataset: ShapesDataset, indices: range) -> Tensor:
    """[B, C, H, W] in [-1, 1]."""
    return torch.stack([dataset.load(i).video[:, 0] for i in indices])
