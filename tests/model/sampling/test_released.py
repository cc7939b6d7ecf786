"""A bare .pth as released, with VAE and text encoder beside it or on the Hub: all the way to frames, on tiny files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

pytest.importorskip("transformers", reason="the pipeline is an extra of stdit-model")

from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stdit_model import STDiT, STDiTPipeline
from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import WeightsError
from stdit_model.text import encode_captions

SIZES: dict[str, Any] = {"depth": 2, "hidden_size": 72, "num_heads": 1, "caption_channels": 32, "model_max_length": 12}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A tiny VAE with the strides of Stable Diffusion's, and a tiny T5 with its tokenizer, as folders."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    text = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5EncoderModel(text).save_pretrained(tmp_path / "t5")
    ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    return tmp_path


@pytest.fixture
def open_sora(tmp_path: Path) -> Path:
    """The layout of OpenSora-v1-HQ-16x512x512.pth at 4x32x48: state dict at the top, position buffers in it."""
    torch.manual_seed(0)
    model = STDiT(**SIZES)
    tensors = dict(model.state_dict())
    tensors["pos_embed"] = spatial_positions(72, 2, 3, 0.5)[None]
    tensors["pos_embed_temporal"] = temporal_positions(72, 4, 1.0)[None]
    torch.save(tensors, tmp_path / "OpenSora-v1-tiny.pth")
    return tmp_path / "OpenSora-v1-tiny.pth"


@pytest.fixture
def pixart(tmp_path: Path) -> Path:
    """The layout of PixArt-XL-2-512x512.pth at 32x32: under `state_dict`, no temporal attention, a 4-D patch kernel."""
    torch.manual_seed(0)
    tensors = {name: t for name, t in STDiT(**SIZES).state_dict().items() if ".attn_temp." not in name}
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].squeeze(2)
    tensors["pos_embed"] = spatial_positions(72, 2, 2, 1.0)[None]
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "PixArt-tiny.pth")
    return tmp_path / "PixArt-tiny.pth"


def frames(pipeline: STDiTPipeline, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", generator=generator, num_inference_steps=2, **arguments).frames


def test_open_sora(open_sora: Path, parts: Path) -> None:
    pipeline = STDiTPipeline.from_released(open_sora, vae=parts / "vae", text_encoder=parts / "t5")
    config = pipeline.config
    assert (config.num_frames, config.height, config.width) == (4, 32, 48)  # from the position buffers
    assert (config.num_inference_steps, config.guidance_scale, config.fps) == (100, 7.0, 8)
    assert pipeline.transformer.config.space_scale == 0.5
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert frames(pipeline).shape == (1, 3, 4, 32, 48)


def test_open_sora_from_the_hub(open_sora: Path, parts: Path, hub_cache: Callable[[str], Path]) -> None:
    """By the usual ids, from the cache that a download leaves."""
    import shutil

    shutil.copy(open_sora, hub_cache("hpcai-tech/Open-Sora") / "OpenSora-v1-tiny.pth")
    for repo, folder in (("stabilityai/sd-vae-ft-ema", "vae"), ("DeepFloyd/t5-v1_1-xxl", "t5")):
        shutil.copytree(parts / folder, hub_cache(repo), dirs_exist_ok=True)
    pipeline = STDiTPipeline.from_released("hpcai-tech/Open-Sora/OpenSora-v1-tiny.pth")
    assert frames(pipeline).shape == (1, 3, 4, 32, 48)


def test_offline_everything_that_is_missing_is_told_at_once(
    open_sora: Path, parts: Path, hub_cache: Callable[[str], Path]
) -> None:
    with pytest.raises(WeightsError) as error:
        STDiTPipeline.from_released(open_sora)
    message = str(error.value)
    for said in (
        "vae stabilityai/sd-vae-ft-ema",
        "text_encoder and tokenizer DeepFloyd/t5-v1_1-xxl",
        "hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema` and --vae sd-vae-ft-ema",
        "hf download DeepFloyd/t5-v1_1-xxl --local-dir t5-v1_1-xxl` and --text-encoder t5-v1_1-xxl",
    ):
        assert said in message
    assert "\n" not in message
    with pytest.raises(WeightsError, match="not available from the Hub"):
        STDiTPipeline.from_released("hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        STDiTPipeline.from_released(open_sora, vae="./no-vae", text_encoder=parts / "t5")


def test_parts_of_another_kind_are_refused(open_sora: Path, parts: Path) -> None:
    text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    T5EncoderModel(text).save_pretrained(parts / "small")
    ByT5Tokenizer().save_pretrained(parts / "small")
    with pytest.raises(WeightsError, match="captions 32 wide, this text encoder's are 16"):
        STDiTPipeline.from_released(open_sora, vae=parts / "vae", text_encoder=parts / "small")


@pytest.mark.filterwarnings("ignore:.*position")
def test_pixart_makes_pictures(pixart: Path, parts: Path) -> None:
    pipeline = STDiTPipeline.from_released(pixart, vae=parts / "vae", text_encoder=parts / "t5")
    config = pipeline.config
    assert (config.num_frames, config.height, config.width, config.guidance_scale) == (1, 32, 32, 4.5)
    assert frames(pipeline).shape == (1, 3, 1, 32, 32)


def test_pixart_of_diffusers_takes_the_empty_prompt_for_no_text(parts: Path) -> None:
    torch.manual_seed(0)
    PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=72, num_layers=2, cross_attention_dim=72, sample_size=8,
        caption_channels=32, patch_size=2, out_channels=8, in_channels=4, norm_num_groups=1, attention_bias=True,
        use_additional_conditions=False,
    ).save_pretrained(parts / "pixart")  # fmt: skip
    pipeline = STDiTPipeline.from_released(parts / "pixart", vae=parts / "vae", text_encoder=parts / "t5")
    assert (pipeline.config.height, pipeline.config.num_frames) == (64, 1)
    y, _ = encode_captions(pipeline.tokenizer, pipeline.text_encoder, [""], 120)
    torch.testing.assert_close(pipeline.transformer.null_caption(1, 120), y)
    assert frames(pipeline).shape == (1, 3, 1, 64, 64)
