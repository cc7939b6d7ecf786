"""Sizes of latents from a VAE's configuration alone are those of the VAE."""

import diffusers
import pytest
import torch

from stdit_model import video_vae
from stdit_train.components.sizes import vae_channels, vae_frames, vae_stride


@pytest.mark.parametrize("name", [*video_vae.IMAGE_VAES, *video_vae.VIDEO_VAES])
def test_latents_of_a_configuration(name: str) -> None:
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**({"timestep_conditioning": False} if "LTX" in name else {}))
    values = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    stride = video_vae.spatial_stride(vae)
    assert vae_stride(values) == stride
    channels, frames, _, _ = video_vae.latent_shape(vae, 17, 2 * stride, 2 * stride)
    assert (vae_channels(values), vae_frames(values, 17)) == (channels, frames)
