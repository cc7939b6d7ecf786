"""Each of diffusers' VAEs that is said to work, as a tiny untrained one: shapes, cuts, statistics, and a pipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from torch import Tensor

from stdit_model import STDiT, STDiTPipeline, video_vae
from stdit_model.errors import SettingsError
from stdit_model.sampling.schedulers import flow_scheduler

SMALL: dict[str, Any] = {"latent_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8, 8, 8)}
LTX: dict[str, Any] = {
    "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "patch_size": 1,
    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
}  # fmt: skip
VAES: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4,
    ),
    "AsymmetricAutoencoderKL": lambda: AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_out_channels=(8, 8), up_block_out_channels=(8, 8), norm_num_groups=4,
    ),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    ),
    "AutoencoderDC": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.41407,
    ),
    "AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    ),
    "AutoencoderKLWan": lambda: AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ),
    "AutoencoderKLHunyuanVideo": lambda: AutoencoderKLHunyuanVideo(norm_num_groups=4, **SMALL),
    "AutoencoderKLCogVideoX": lambda: AutoencoderKLCogVideoX(norm_num_groups=2, **SMALL),
    "AutoencoderKLLTXVideo": lambda: AutoencoderKLLTXVideo(**LTX),
    "AutoencoderKLMochi": lambda: AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 3.0, 4.0),
    ),
}  # fmt: skip
# Latents of 13, 16 and 18 frames; 2-D VAEs have one of each frame.
LATENTS = {
    "AutoencoderKLWan": (4, 5, 6),
    "AutoencoderKLHunyuanVideo": (4, 5, 6),
    "AutoencoderKLCogVideoX": (5, 5, 7),
    "AutoencoderKLLTXVideo": (4, 5, 6),
    "AutoencoderKLMochi": (3, 4, 4),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return VAES[name]().eval()


def clip(frames: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_one_is_here() -> None:
    assert set(VAES) == {*video_vae.IMAGE_VAES, *video_vae.VIDEO_VAES}
    assert set(LATENTS) == set(video_vae.VIDEO_VAES)


@pytest.mark.parametrize("name", VAES)
def test_round_trip(name: str) -> None:
    vae = make(name)
    for i, frames in enumerate((13, 16, 18)):
        video = clip(frames, batch=2 if frames == 13 else 1)
        moments = video_vae.encode_moments(vae, video)
        latents = video_vae.sample_latents(vae, moments, torch.randn_like(moments[:, : moments.shape[1] // 2]))
        assert tuple(latents.shape[1:]) == video_vae.latent_shape(vae, frames, 32, 32)
        assert latents.shape[2] == LATENTS.get(name, (13, 16, 18))[i]
        again = video_vae.decode(vae, latents, frames=frames)
        assert again.shape == video.shape
        assert again.isfinite().all()
        assert again.std() > 0


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLMochi"])
def test_latents_of_whole_groups_of_frames_do_not_depend_on_later_ones(name: str) -> None:
    """So the first frames of a video that is continued may be encoded alone; the other two normalise over time."""
    vae = make(name)
    whole = video_vae.whole_latent_frames(vae, 8)
    assert whole == 2
    first, more = clip(8), clip(8)
    more = torch.cat([more, -more], dim=2)
    alone = video_vae.encode_moments(vae, first)[:, :, :whole]
    torch.testing.assert_close(video_vae.encode_moments(vae, more)[:, :, :whole], alone, rtol=1e-3, atol=1e-4)


def test_statistics_of_the_latents() -> None:
    """By the configuration or buffers, as diffusers' own pipelines use them."""
    wan, ltx, dc, tiny = (make(f"Autoencoder{name}") for name in ("KLWan", "KLLTXVideo", "DC", "Tiny"))
    ltx.latents_mean += 2.0
    ltx.latents_std *= 4.0
    with torch.no_grad():
        mean = wan.encode(clip(5)).latent_dist.mean
        expected = (mean - torch.tensor(wan.config.latents_mean).view(1, -1, 1, 1, 1)) / torch.tensor(
            wan.config.latents_std
        ).view(1, -1, 1, 1, 1)
        found = video_vae.sample_latents(wan, video_vae.encode_moments(wan, clip(5)))
        torch.testing.assert_close(found, expected)
        mean = ltx.encode(clip(5)).latent_dist.mean
        found = video_vae.sample_latents(ltx, video_vae.encode_moments(ltx, clip(5)))
        torch.testing.assert_close(found, (mean - 2.0) / 4.0)
        for vae, scale in ((dc, 0.41407), (tiny, 1.0)):
            encoded = vae.encode(clip(1)[:, :, 0])
            latent = (encoded.latent if vae is dc else encoded.latents)[:, :, None]
            found = video_vae.sample_latents(vae, video_vae.encode_moments(vae, clip(1)))
            torch.testing.assert_close(found, latent * scale)


def test_a_decoder_across_time_decodes_one_clip_at_a_time() -> None:
    vae = make("AutoencoderKLTemporalDecoder")
    vae.decoder.time_conv_out.weight.data.normal_()
    latents = torch.randn(2, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    both = video_vae.decode(vae, latents)
    assert both.shape == (2, 3, 5, 32, 32)
    torch.testing.assert_close(both[1:], video_vae.decode(vae, latents[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(both, video_vae.decode(vae, latents, chunk=2))


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderTiny"])
def test_a_pipeline(name: str) -> None:
    """It makes the frames that are asked for, and continues given ones."""
    vae = make(name)
    torch.manual_seed(0)
    model = STDiT(
        depth=1, hidden_size=32, num_heads=4, caption_channels=8, model_max_length=4, learn_sigma=False,
        in_channels=video_vae.latent_channels(vae),
    )  # fmt: skip
    pipeline = STDiTPipeline(model.eval(), vae, None, None, flow_scheduler(), num_frames=7, height=32, width=32)
    pipeline.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 4, 8), "prompt_attention_mask": torch.ones(1, 4)}
    video = pipeline(**text, num_inference_steps=1).frames
    assert video.shape == (1, 3, 7, 32, 32)
    continued = pipeline(**text, num_inference_steps=1, first_frames=clip(3)).frames
    assert torch.equal(continued[:, :, :3], clip(3))
    assert continued.shape == (1, 3, 7, 32, 32)


def test_refused_by_name() -> None:
    blocks: dict[str, Any] = {
        "down_block_types": ("AllegroDownBlock3D",) * 4, "up_block_types": ("AllegroUpBlock3D",) * 4,
    }  # fmt: skip
    allegro = AutoencoderKLAllegro(**blocks, norm_num_groups=2, **SMALL)
    with pytest.raises(SettingsError, match=r"AutoencoderKLAllegro cannot be used: take AutoencoderKLWan,"):
        video_vae.latent_shape(allegro, 16, 32, 32)
    with pytest.raises(SettingsError, match="whose decoder takes a timestep"):
        video_vae.latent_shape(AutoencoderKLLTXVideo(**LTX, timestep_conditioning=True), 9, 32, 32)
