"""Sizes of latents from a VAE's configuration alone are those of the VAE."""

import diffusers
import pytest
import torch

from stdit_model import video_vae
from stdit_train.components.sizes import check_vae_frames, component_config, vae_channels, vae_frames, vae_stride
from stdit_train.errors import ConfigError


@pytest.mark.parametrize("name", [*video_vae.IMAGE_VAES, *video_vae.VIDEO_VAES])
def test_latents_of_a_configuration(name: str) -> None:
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**({"timestep_conditioning": False} if "LTX" in name else {}))
    values = {key: value for key, value in vae.config.items() if not key.startswith("_")} | {"_class_name": name}
    stride = video_vae.spatial_stride(vae)
    assert vae_stride(values) == stride
    for count in (13, 16, 17, 1):
        channels, frames, _, _ = video_vae.latent_shape(vae, count, 2 * stride, 2 * stride)
        assert (vae_channels(values), vae_frames(values, count)) == (channels, frames)
        if name in video_vae.IMAGE_VAES or count == 1:
            check_vae_frames(values, count)


@pytest.mark.parametrize(
    ("name", "frames", "nearest"),
    [
        ("AutoencoderKLWan", 16, "13 and 17"),
        ("AutoencoderKLCogVideoX", 13, "9 and 17"),
        ("AutoencoderKLMochi", 9, "7 and 13"),
    ],
)
def test_frames_that_do_not_fill_the_latents(name: str, frames: int, nearest: str) -> None:
    with torch.device("meta"):
        values = {**getattr(diffusers, name)().config, "_class_name": name}
    low, high = map(int, nearest.split(" and "))
    check_vae_frames(values, low)
    check_vae_frames(values, high)
    with pytest.raises(
        ConfigError, match=rf"{frames} frames: the VAE takes 1 \+ a multiple .* the nearest are {nearest}"
    ):
        check_vae_frames(values, frames)


@pytest.mark.parametrize("source", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae", "zai-org/CogVideoX-2b/vae"])
def test_published_video_vaes_have_the_sizes_that_are_said(source: str) -> None:
    found = component_config(source, "vae")
    with torch.device("meta"):
        vae = getattr(diffusers, found.values["_class_name"]).from_config(found.values)
    assert found.note is None
    assert sum(parameter.numel() for parameter in vae.parameters()) == found.parameters
    assert video_vae.latent_shape(vae, 17, 64, 64) == (16, 5, 8, 8)
