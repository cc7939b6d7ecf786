"""A tiny pipeline with real parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from stdit_model import STDiT, STDiTPipeline


@pytest.fixture(scope="session")
def tiny_vae() -> Callable[[int], AutoencoderKL]:
    """An untrained AutoencoderKL that takes 2^(levels-1) pixels to a latent."""

    def make(levels: int) -> AutoencoderKL:
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8,) * levels,
            layers_per_block=1,
            norm_num_groups=4,
        )

    return make


@pytest.fixture(scope="session")
def make_pipeline(tiny_vae: Callable[[int], AutoencoderKL]) -> Callable[[], STDiTPipeline]:
    """A rectified-flow pipeline for clips of 4 frames of 32x32."""
    transformers = pytest.importorskip("transformers", reason="the pipeline is an extra of stdit-model")

    def make() -> STDiTPipeline:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "caption_channels": 32}
        model = STDiT(**sizes, model_max_length=12, learn_sigma=False)
        for block in model.blocks:  # nothing is zero after training
            nn.init.normal_(block.attn_temp.proj.weight, std=0.1)
            nn.init.normal_(block.cross_attn.proj.weight, std=0.1)
        nn.init.normal_(model.final_layer.linear.weight, std=0.1)
        text = transformers.T5Config(
            vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
        pipe = STDiTPipeline(
            model.eval(),
            tiny_vae(4),
            transformers.T5EncoderModel(text).eval(),
            transformers.ByT5Tokenizer(),
            FlowMatchEulerDiscreteScheduler(shift=4.0),
            num_frames=4,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=3.0,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="module")
def pipeline(make_pipeline: Callable[[], STDiTPipeline]) -> STDiTPipeline:
    """Shared by the tests of a file, which leave it as it is."""
    return make_pipeline()
