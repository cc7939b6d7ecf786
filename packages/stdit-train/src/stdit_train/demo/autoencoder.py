"""Train the demo's 2-D VAE on single frames of `shapes`: a diffusers AutoencoderKL, 8x down, 4 latent channels.

B batch, H W pixels, h w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from stdit_data.datasets.shapes import ShapesDataset


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and training of the VAE.

    The first three latent channels are held to the frame at latent size: the error of that counts as much as the
    error of the reconstruction, and the channels left over carry what a small picture can't tell. Latents that are
    nearly a picture are far easier to denoise than whatever an encoder comes up with when it is free to choose.

    `kl_weight` (times the KL summed over a latent) is small on purpose: at 1e-6 a latent channel collapses. Full
    frames, not crops: GroupNorm statistics of crops differ from those of frames.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 4
    norm_num_groups: int = 8
    size: int = 64
    batch: int = 8
    steps: int = 1500
    decoder_steps: int = 3500
    lr: float = 2e-3
    kl_weight: float = 1e-7
    seed: int = 0


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """Build an untrained AutoencoderKL without attention in its middle block."""
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
    """Train both halves, then the decoder alone on the latents of the finished encoder, as sd-vae-ft was trained.

    Args:
        config: sizes and schedule.
        on_step: called with (step, reconstruction error) after each of `config.steps + config.decoder_steps` steps.

    Returns:
        The VAE, with its latent statistics set.
    """
    vae = build_autoencoder(config).train()
    frames = ShapesDataset(frames=1, height=config.size, width=config.size, seed=config.seed, spread=0.5)
    _train(vae, config, frames, on_step)
    mean, std = latent_statistics(vae.eval(), frames)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return train_decoder(vae, config, frames, on_step)


def train_decoder(
    vae: AutoencoderKL, config: AutoencoderConfig, frames: ShapesDataset, on_step: Callable[[int, float], None]
) -> AutoencoderKL:
    """Train the decoder alone; the encoder, and so every latent, does not change."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _train(vae, config, frames, on_step, decoder_alone=True)
    return vae.eval().requires_grad_(True)


def _train(
    vae: AutoencoderKL,
    config: AutoencoderConfig,
    frames: ShapesDataset,
    on_step: Callable[[int, float], None],
    decoder_alone: bool = False,
) -> None:
    """Train for one phase, with its own optimizer and one-cycle rate; step i sees frames i * batch and on."""
    first = config.steps if decoder_alone else 0
    steps = config.decoder_steps if decoder_alone else config.steps
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.03)
    generator = torch.Generator().manual_seed(config.seed + first)
    for step in range(first, first + steps):
        x_BCHW = _frames(frames, range(step * config.batch, (step + 1) * config.batch))
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast as float32 on CPUs that have it
            posterior = vae.encode(x_BCHW).latent_dist
            z_BChw = posterior.sample(generator=generator)
            reconstruction = vae.decode(z_BChw).sample
        loss = error = F.mse_loss(reconstruction.float(), x_BCHW)
        if not decoder_alone:
            small = F.adaptive_avg_pool2d(x_BCHW, z_BChw.shape[-2:])
            loss = error + F.mse_loss(z_BChw[:, :3].float(), small) + config.kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, error.item())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, frames: ShapesDataset, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, each [C], of posterior samples over `count` frames."""
    posteriors = [vae.encode(_frames(frames, range(i, i + 32))).latent_dist for i in range(0, count, 32)]
    mean = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))
    return mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + noise).sqrt()


def _frames(dataset: ShapesDataset, indices: range) -> Tensor:
    """Return frames [B, C, H, W] in [-1, 1]."""
    return torch.stack([dataset.load(i).video[:, 0] for i in indices])
