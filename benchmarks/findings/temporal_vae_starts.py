"""Image VAEs that the VAEs of temporal_vae.py start from."""

import torch
from diffusers import AutoencoderKL
from temporal_vae_report import SHAPES
from torch import Tensor

from stdit_data.datasets.shapes import ShapesDataset

DEVIATION = 0.5  # of latents that are to become codes, whose range is -1 to 1


@torch.no_grad()
def widened(image: AutoencoderKL, channels: int, seed: int) -> AutoencoderKL:
    """Return an image VAE with more latent channels: the first are the old ones, and it decodes what it did before.

    The means of the new ones are random features of the encoder, with a deviation of 0.05, which the decoder learns to
    read: it starts with zeros there.
    """
    old = image.config.latent_channels
    torch.manual_seed(seed)
    wide: AutoencoderKL = AutoencoderKL.from_config({**image.config, "latent_channels": channels})
    weights = image.state_dict()
    means, first = torch.arange(old), torch.arange(2 * old)
    moments = torch.cat([means, channels + means])
    fresh = torch.arange(old, channels)
    for key, target in wide.state_dict().items():
        source = weights[key]
        if target.shape == source.shape:
            target.copy_(source)
        elif key.startswith("encoder.conv_out"):
            target[moments] = source[first]
            target[channels + fresh] = -6.0 if key.endswith("bias") else 0.0
        elif key.startswith("decoder.conv_in"):
            target.zero_()[:, :old] = source
        elif key.startswith(("quant_conv", "post_quant_conv")):
            places = moments if key.startswith("quant") else means
            if key.endswith("bias"):
                target.zero_()[places] = source
            else:
                target.copy_(torch.eye(len(target))[..., None, None])
                target[places] = 0.0
                target[places[:, None], places[None]] = source
        else:
            raise ValueError(f"{key}: {tuple(source.shape)} in the image VAE, {tuple(target.shape)} expected")
    wide.register_to_config(latents_mean=None, latents_std=None)
    return wide


def stills() -> Tensor:
    """Return frames of `shapes` [64, 3, H, W] in [-1, 1]."""
    clips = ShapesDataset(frames=1, height=SHAPES[1], width=SHAPES[1], spread=0.5)
    return torch.stack([clips.load(index, seed=0, epoch=0).video[:, 0] for index in range(64)])


@torch.no_grad()
def scaled(image: AutoencoderKL, frames: Tensor) -> AutoencoderKL:
    """Return an image VAE whose latents of frames [N, 3, H, W] have mean 0 and `DEVIATION`; it decodes as before.

    FSQ bounds its latents by tanh before it rounds them; those of a VAE that hardly pays for KL reach far beyond.
    """
    latents = image.encode(frames).latent_dist.mean
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / DEVIATION
    channels = len(mean)
    inwards, outwards = image.quant_conv, image.post_quant_conv  # 1x1, so that no padding is shifted
    inwards.weight[:channels] /= scale[:, None, None, None]
    inwards.bias[:channels] = (inwards.bias[:channels] - mean) / scale
    inwards.bias[channels:] -= 2 * scale.log()
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= scale[None, :, None, None]
    image.register_to_config(latents_mean=None, latents_std=None)
    return image
