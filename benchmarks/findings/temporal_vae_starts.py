"""The image VAE that VAEs of temporal_vae.py start from."""

import torch
from diffusers import AutoencoderKL


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
