"""A bare .pth as released, with VAE and text encoder beside it or on the Hub: all the way to frames, on tiny files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

pytest.importorskip("transformers", reason="the pipeline is an extra of stdit-model")

from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stdit_model import STDiT, STDiTPipeline
from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import SettingsError, WeightsError
from stdit_model.sampling.folder import write_pipeline

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
        "hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema` and `vae=sd-vae-ft-ema`",
        "hf download DeepFloyd/t5-v1_1-xxl --local-dir t5-v1_1-xxl` and `text_encoder=t5-v1_1-xxl`",
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


@pytest.mark.parametrize("by_id", [False, True], ids=["folder", "Hub id"])
def test_components_by_hub_id_take_the_options_of_a_pipeline(
    open_sora: Path, parts: Path, hub_cache: Callable[[str], Path], by_id: bool
) -> None:
    for repo, folder in (("stabilityai/sd-vae-ft-ema", "vae"), ("DeepFloyd/t5-v1_1-xxl", "t5")):
        shutil.copytree(parts / folder, hub_cache(repo), dirs_exist_ok=True)
    write_pipeline(open_sora, parts / "pipeline")
    source: str | Path = parts / "pipeline"
    if by_id:
        shutil.copytree(source, hub_cache("me/pipeline"), dirs_exist_ok=True)
        source = "me/pipeline"
    pipeline = STDiTPipeline.from_pretrained(source, dtype=torch.bfloat16)
    found = {name: getattr(pipeline, name).dtype for name in ("transformer", "vae", "text_encoder")}
    assert set(found.values()) == {torch.bfloat16}, found
    types = {"text_encoder": torch.bfloat16, "default": torch.float32}
    pipeline = STDiTPipeline.from_pretrained(source, torch_dtype=types)
    assert (pipeline.vae.dtype, pipeline.text_encoder.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(WeightsError, match="text_encoder and tokenizer DeepFloyd/t5-v1_1-xxl: not found"):
        STDiTPipeline.from_pretrained(parts / "pipeline", cache_dir=parts / "another")


@pytest.mark.filterwarnings("ignore:.*position")
def test_pixart_makes_pictures(pixart: Path, parts: Path) -> None:
    pipeline = STDiTPipeline.from_released(pixart, vae=parts / "vae", text_encoder=parts / "t5")
    config = pipeline.config
    assert (config.num_frames, config.height, config.width, config.guidance_scale) == (1, 32, 32, 4.5)
    assert frames(pipeline).shape == (1, 3, 1, 32, 32)


@pytest.fixture
def pixart_of_diffusers(parts: Path) -> Path:
    torch.manual_seed(0)
    PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=72, num_layers=2, cross_attention_dim=72, sample_size=8,
        caption_channels=32, patch_size=2, out_channels=8, in_channels=4, norm_num_groups=1, attention_bias=True,
        use_additional_conditions=False,
    ).save_pretrained(parts / "pixart")  # fmt: skip
    return parts / "pixart"


def test_pixart_of_diffusers_is_guided_as_diffusers_does(pixart_of_diffusers: Path, parts: Path) -> None:
    """It has no null caption: the empty prompt takes its place, under its own mask."""
    pipeline = STDiTPipeline.from_released(pixart_of_diffusers, vae=parts / "vae", text_encoder=parts / "t5")
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.config.height, pipeline.config.num_frames) == (64, 1)
    reference = PixArtAlphaPipeline(
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.vae,
        PixArtTransformer2DModel.from_pretrained(pixart_of_diffusers),
        DDIMScheduler(clip_sample=False),
    )
    reference.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected = reference(
        "a red fox", latents=noise, use_resolution_binning=False, clean_caption=False, **settings
    ).images
    found = pipeline("a red fox", latents=noise[:, :, None], guidance_scale=4.5, **settings).frames[:, :, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_default_negative_prompt_is_kept_and_asked_for(pixart_of_diffusers: Path, parts: Path) -> None:
    sources: dict[str, Any] = {"vae": parts / "vae", "text_encoder": parts / "t5", "tokenizer": parts / "t5"}
    write_pipeline(pixart_of_diffusers, parts / "pipeline", **sources)
    pipeline = STDiTPipeline.from_pretrained(parts / "pipeline")
    assert pipeline.config.negative_prompt == ""
    embeds = pipeline.encode_prompt("a red fox", do_classifier_free_guidance=False)
    assert torch.equal(embeds.prompt_embeds, pipeline.encode_prompt("a red fox").prompt_embeds)
    without = STDiTPipeline.from_pretrained(parts / "pipeline", text_encoder=None, tokenizer=None)
    given = {"prompt_embeds": embeds.prompt_embeds, "prompt_attention_mask": embeds.prompt_attention_mask}
    with pytest.raises(SettingsError, match="pass negative_prompt_embeds"):
        without(**given, num_inference_steps=1)
    assert (
        without(**given, num_inference_steps=1, guidance_scale=1.0, num_frames=1, height=64, width=64)
        .frames.isfinite()
        .all()
    )


@pytest.fixture
def pixart_pipeline(pixart_of_diffusers: Path, parts: Path) -> Path:
    """A folder as PixArt-alpha/PixArt-XL-2-512x512 on the Hub."""
    folder = parts / "PixArt-XL"
    pipeline = PixArtAlphaPipeline(
        ByT5Tokenizer.from_pretrained(parts / "t5"),
        T5EncoderModel.from_pretrained(parts / "t5"),
        AutoencoderKL.from_pretrained(parts / "vae"),
        PixArtTransformer2DModel.from_pretrained(pixart_of_diffusers),
        DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by_id", [False, True], ids=["folder", "Hub id"])
def test_a_pixart_pipeline_brings_its_own_components(
    pixart_pipeline: Path, hub_cache: Callable[[str], Path], by_id: bool
) -> None:
    source: str | Path = pixart_pipeline
    if by_id:
        shutil.copytree(pixart_pipeline, hub_cache("PixArt-alpha/PixArt-XL-2-512x512"), dirs_exist_ok=True)
        source = "PixArt-alpha/PixArt-XL-2-512x512"
    pipeline = STDiTPipeline.from_released(source)
    config = pipeline.config
    assert (config.num_inference_steps, config.guidance_scale, config.negative_prompt) == (20, 4.5, "")
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    own = AutoencoderKL.from_pretrained(pixart_pipeline / "vae")
    assert torch.equal(own.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)
    assert frames(pipeline).shape == (1, 3, 1, 64, 64)


def test_pipelines_of_other_classes_are_refused_by_name(
    pixart_pipeline: Path, hub_cache: Callable[[str], Path]
) -> None:
    with pytest.raises(WeightsError, match=r"a PixArtAlphaPipeline .*, not an STDiTPipeline; .*from_released loads it"):
        STDiTPipeline.from_pretrained(pixart_pipeline)
    index = {"_class_name": "LattePipeline", "transformer": ["diffusers", "LatteTransformer3DModel"]}
    (hub_cache("maxin-cn/Latte-1") / "model_index.json").write_text(json.dumps(index))
    for load in (STDiTPipeline.from_pretrained, STDiTPipeline.from_released):
        with pytest.raises(WeightsError, match="maxin-cn/Latte-1: a LattePipeline around a LatteTransformer3DModel"):
            load("maxin-cn/Latte-1")
