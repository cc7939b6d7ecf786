"""The causal video VAE: an image VAE in it without loss, nothing ahead of time, chunks that equal the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from stdit_model import CausalVideoVAE, video_vae
from stdit_model.errors import SettingsError, WeightsError

torch.set_num_threads(1)


def image_vae(attention: bool = True, layers: int = 1, **sizes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=layers,
        mid_block_add_attention=attention,
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
        **sizes,
    )
    for parameter in vae.parameters():  # norms and biases are ones and zeros at first, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vae.eval()


def trained(ratio: int) -> CausalVideoVAE:
    """A video VAE whose taps over time are not zero, as after training."""
    video = CausalVideoVAE.from_image_vae(image_vae(), ratio).eval()
    for parameter in video.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return video


@pytest.mark.parametrize(("ratio", "attention", "layers"), [(1, True, 1), (2, False, 1), (4, True, 2)])
@torch.no_grad()
def test_the_first_frame_and_an_image_are_reconstructed_as_by_the_image_vae(
    ratio: int, attention: bool, layers: int
) -> None:
    image = image_vae(attention, layers)
    video = CausalVideoVAE.from_image_vae(image, ratio).eval()
    clip = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    posterior = image.encode(clip[:, :, 0]).latent_dist
    expected = image.decode(posterior.mode()).sample
    assert expected.std() > 0.1
    for frames in (clip, clip[:, :, :1]):
        found = video.encode(frames).latent_dist
        torch.testing.assert_close(found.parameters[:, :, 0], posterior.parameters, atol=1e-5, rtol=1e-5)
        again = video.decode(found.mode()).sample
        assert again.shape == frames.shape
        torch.testing.assert_close(again[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    assert video.config.latents_std == [2.0] * 4


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("latents", [1, 2, 3])
@torch.no_grad()
def test_chunks_equal_the_whole(ratio: int, latents: int) -> None:
    video = trained(ratio)
    clip = torch.rand(1, 3, 1 + 4 * 4, 16, 16) * 2 - 1
    moments = video.encode(clip).latent_dist.parameters
    z = moments.chunk(2, dim=1)[0]
    assert z.shape[2] == 1 + 16 // ratio
    whole = video.decode(z).sample
    video.enable_chunks(latents)
    torch.testing.assert_close(video.encode(clip).latent_dist.parameters, moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(video.decode(z).sample, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_looks_ahead() -> None:
    video = trained(4)
    clip = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    changed = clip.clone()
    changed[:, :, 5:] = 0.0  # the third latent and on
    first, second = (video.encode(each).latent_dist.mode() for each in (clip, changed))
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.allclose(first[:, :, 2], second[:, :, 2])
    assert torch.equal(video.decode(first).sample[:, :, :5], video.decode(second).sample[:, :, :5])
    # ... and what came before is seen: the taps over time are in use
    other = torch.cat([torch.zeros_like(first[:, :, :1]), first[:, :, 1:]], dim=2)
    assert not torch.allclose(video.decode(other).sample[:, :, 1:5], video.decode(first).sample[:, :, 1:5])


def test_the_two_frames_of_a_latent_have_weights_of_their_own() -> None:
    video = CausalVideoVAE.from_image_vae(image_vae(), 4)
    frames = video.decode(torch.randn(1, 4, 3, 4, 4)).sample
    assert torch.equal(frames[:, :, 1], frames[:, :, 2])  # before training a latent is a still
    frames[:, :, 1].square().sum().backward()
    doubling = video.decoder.up_blocks[0].upsamplers[0].conv.weight.grad
    assert doubling is not None
    assert not torch.allclose(*doubling.chunk(2))


def test_frames_that_it_cannot_take_are_refused_with_the_nearest() -> None:
    video = trained(4)
    with pytest.raises(SettingsError, match=r"16 frames: .* 1 \+ a multiple of 4, the nearest are 13 and 17"):
        video.encode(torch.zeros(1, 3, 16, 16, 16))
    with pytest.raises(SettingsError, match="power of two up to 4"):
        CausalVideoVAE(block_out_channels=(8, 8, 8), norm_num_groups=4, temporal_compression_ratio=8)


def test_an_image_vae_of_another_kind_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"not an AutoencoderKL that a video VAE .* quant_conv"):
        CausalVideoVAE.from_image_vae(image_vae(use_quant_conv=False))
    video = CausalVideoVAE.from_image_vae(image_vae())
    wrong = image_vae()
    wrong.encoder.conv_in = torch.nn.Conv2d(3, 9, 3)
    with pytest.raises(WeightsError, match=r"conv_in.weight is \(9, 3, 3, 3\)"):
        video.load_image_vae(wrong)


@torch.no_grad()
def test_it_is_saved_loaded_and_used_like_any_vae(tmp_path: Path) -> None:
    video = trained(2)
    video.save_pretrained(tmp_path)
    loaded = CausalVideoVAE.from_pretrained(tmp_path)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    moments = video_vae.encode_moments(loaded, clip)
    assert moments.shape[1:] == (8, *video_vae.latent_shape(loaded, 5, 16, 16)[1:]) == (8, 3, 4, 4)
    latents = video_vae.sample_latents(loaded, moments)
    expected = video(clip).sample.clamp(-1, 1)
    torch.testing.assert_close(video_vae.decode(loaded, latents), expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    video, clip = trained(2).train(), torch.rand(1, 3, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            video.enable_gradient_checkpointing()
        video.zero_grad()
        video(clip).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in video.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(video.parameters()))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
