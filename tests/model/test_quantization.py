"""Finite scalar quantisation: the levels, the gradient through the rounding, the indices, and a VAE that has them."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from stdit_model import CausalVideoVAE, video_vae
from stdit_model.causal_vae.quantization import (
    code_bits,
    codes_to_indices,
    indices_to_codes,
    nearest_codes,
    quantize,
)
from stdit_model.errors import SettingsError

torch.set_num_threads(1)
LEVELS = (8, 5, 2)


def vae(ratio: int, sizes: int = 3) -> CausalVideoVAE:
    torch.manual_seed(0)
    video = CausalVideoVAE(
        latent_channels=3,
        block_out_channels=(8,) * sizes,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        temporal_compression_ratio=ratio,
        levels=LEVELS,
    ).eval()
    for parameter in video.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return video


def test_each_channel_has_its_levels_and_no_others() -> None:
    line = torch.linspace(-20, 20, 4001)
    codes = quantize(line.expand(1, 3, -1), LEVELS)
    for channel, number in enumerate(LEVELS):
        half = number // 2
        expected = torch.arange(-half, number - half) / half
        assert torch.equal(codes[0, channel].unique(), expected)
        assert codes[0, channel].diff().min() >= 0  # in order
    assert quantize(torch.zeros(1, 3, 1), LEVELS).abs().max() == 0  # zero is a code, of even numbers of levels as well


def test_the_widths_of_the_levels_are_those_of_the_paper() -> None:
    """Five levels: tanh bounds to ±2, so that the middle one reaches from atanh(-1/4) to atanh(1/4)."""
    edge = math.atanh(0.5 / (2 * 1.001))
    inside, outside = torch.tensor([[[edge - 1e-3], [edge + 1e-3]]]).chunk(2, dim=1)
    assert quantize(inside, (5,)) == 0
    assert quantize(outside, (5,)) == 0.5


def test_the_gradient_is_that_of_the_bound_alone() -> None:
    z = torch.randn(2, 3, 4, requires_grad=True)
    quantize(z, LEVELS).sum().backward()
    half = (torch.tensor(LEVELS) - 1) * 1.001 / 2
    shift = torch.atanh(0.5 * (torch.tensor(LEVELS) % 2 == 0) / half)
    column = (1, 3, 1)
    slope = (1 - torch.tanh(z.detach() + shift.view(column)) ** 2) * (half / (torch.tensor(LEVELS) // 2)).view(column)
    torch.testing.assert_close(z.grad, slope)


def test_codes_and_indices_are_one_to_one() -> None:
    indices = torch.arange(math.prod(LEVELS)).reshape(2, 8, 5)
    codes = indices_to_codes(indices, LEVELS)
    assert codes.shape == (2, 3, 8, 5)
    assert torch.equal(codes_to_indices(codes, LEVELS), indices)
    every = {tuple(code) for code in codes.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    values = [[k / (n // 2) for k in range(-(n // 2), n - n // 2)] for n in LEVELS]
    assert every == set(itertools.product(*values))
    assert torch.equal(nearest_codes(codes, LEVELS), codes)
    assert torch.equal(nearest_codes(codes + 0.1, LEVELS), codes)
    assert torch.equal(nearest_codes(torch.full((1, 3, 1), 9.0), LEVELS).flatten(), torch.tensor([0.75, 1.0, 0.0]))
    assert code_bits((4, 4)) == 4.0


@pytest.mark.parametrize("ratio", [2, 4])
@torch.no_grad()
def test_the_shapes_of_videogpt_and_magvit(ratio: int, tmp_path: Path) -> None:
    """2x4x4 and 4x4x4 down: encoded to codes, saved and loaded, decoded in chunks as in one piece."""
    video = vae(ratio)
    clip = torch.rand(2, 3, 9, 16, 16) * 2 - 1
    posterior = video.encode(clip).latent_dist
    codes = posterior.mode()
    assert codes.shape == (2, 3, 1 + 8 // ratio, 4, 4)
    assert len(codes_to_indices(codes, LEVELS).unique()) > 3
    assert torch.equal(indices_to_codes(codes_to_indices(codes, LEVELS), LEVELS), codes)
    torch.testing.assert_close(posterior.sample(), codes, atol=1e-5, rtol=0)

    whole = video.decode(codes).sample
    assert torch.equal(video.decode(codes + 0.1).sample, whole)  # to the nearest code
    video.save_pretrained(tmp_path)
    loaded = CausalVideoVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(loaded.encode(clip).latent_dist.mode()).sample, whole)
    loaded.enable_chunks(2)
    assert torch.equal(loaded.encode(clip).latent_dist.mode(), codes)
    torch.testing.assert_close(loaded.decode(codes).sample, whole, atol=1e-5, rtol=1e-5)

    stored = video_vae.encode_moments(video, clip).bfloat16()  # as a cache keeps them
    torch.testing.assert_close(video_vae.decode(video, video_vae.sample_latents(video, stored)), whole.clamp(-1, 1))


@pytest.mark.parametrize("statistics", [{"latents_mean": [3.0, -1.0, 0.0], "latents_std": [4.0, 2.0, 0.3]}, {}])
@torch.no_grad()
def test_an_image_vae_gives_codes_of_its_normalised_latents(statistics: dict[str, list[float]]) -> None:
    """Without statistics by the scaling factor, as sd-vae-ft has it; in chunks of a clip's first frame."""
    torch.manual_seed(0)
    sizes = {"latent_channels": 3, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    image = AutoencoderKL(**sizes, **blocks, scaling_factor=0.25 if not statistics else 1.0, **statistics).eval()
    for parameter in image.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    mean = torch.tensor(statistics.get("latents_mean", [0.0] * 3)).view(1, -1, 1, 1)
    deviation = torch.tensor(statistics.get("latents_std", [4.0] * 3)).view(1, -1, 1, 1)
    video = CausalVideoVAE.from_image_vae(image, 2, LEVELS).eval()
    clip = torch.rand(1, 3, 3, 16, 16) * 2 - 1

    codes = video.encode(clip).latent_dist.mode()
    z = image.encode(clip[:, :, 0]).latent_dist.mean
    assert torch.equal(codes[:, :, 0], quantize(0.5 * (z - mean) / deviation, LEVELS))
    expected = image.decode(codes[:, :, 0] / 0.5 * deviation + mean).sample
    torch.testing.assert_close(video.decode(codes).sample[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    half = video_vae.sample_latents(video, video_vae.encode_moments(video, clip))
    torch.testing.assert_close(half, codes * 2)  # of a deviation of about 1 again


def test_the_encoder_learns_through_the_codes() -> None:
    video = vae(2).train()
    video(torch.rand(1, 3, 3, 16, 16)).sample.square().mean().backward()
    gradient = video.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_levels_that_do_not_fit_the_channels_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"levels \[8, 5\]: expected 3, one for each channel"):
        CausalVideoVAE(latent_channels=3, block_out_channels=(8, 8, 8), norm_num_groups=4, levels=(8, 5))
