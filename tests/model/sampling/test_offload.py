"""Offloaded pipelines make the plain pipeline's videos, to the bit; weights that are not in use are empty or meta."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stdit_model import STDiTPipeline

accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")

CPU = torch.device("cpu")
Make = Callable[[], STDiTPipeline]
WAYS = ("leaf_level", "block_level", "sequential", "model")


def videos(pipeline: STDiTPipeline, negative_prompt: str | None) -> Tensor:
    """Guided in all steps, and in all but the first."""
    return torch.cat(
        [
            pipeline(
                "a cat",
                negative_prompt,
                guidance_start=start,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
            for start in (0.0, 0.4)
        ]
    )


def offload(pipeline: STDiTPipeline, way: str, folder: Path) -> None:
    transformer = pipeline.transformer
    if way == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif way == "sequential":
        accelerate.cpu_offload(transformer, CPU, offload_buffers=True)
    else:  # to disk: in memory, nothing would move on a machine without an accelerator
        transformer.enable_group_offload(CPU, CPU, way, num_blocks_per_group=1, offload_to_disk_path=str(folder))


@pytest.mark.parametrize("negative_prompt", [None, "a dog"], ids=["null caption", "negative prompt"])
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_transformer(make_pipeline: Make, way: str, negative_prompt: str | None, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    plain = videos(pipeline, negative_prompt)
    kept = pipeline.transformer.blocks[0].cross_attn.kv_linear.weight.detach().clone()
    offload(pipeline, way, tmp_path)
    weight = pipeline.transformer.blocks[0].cross_attn.kv_linear.weight
    assert way == "model" or weight.is_meta or not torch.equal(weight, kept)
    assert torch.equal(videos(pipeline, negative_prompt), plain)


def test_embeddings_of_an_offloaded_pipeline(make_pipeline: Make, tmp_path: Path) -> None:
    """What `encode_prompt` returns for the null caption is none of the weights."""
    pipeline = make_pipeline()
    plain = videos(pipeline, None)[:1]
    offload(pipeline, "leaf_level", tmp_path)
    embeds = pipeline.encode_prompt("a cat")
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(pipeline(**embeds._asdict(), generator=generator, output_type="latent").frames, plain)


def test_captions_are_encoded_where_the_pipeline_computes(make_pipeline: Make) -> None:
    """Not on the text encoder's device, which is meta for one that is offloaded layer by layer."""
    pipeline = make_pipeline()
    plain = videos(pipeline, "a dog")
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):  # enable_sequential_cpu_offload
        accelerate.cpu_offload(part, CPU)
    assert pipeline.text_encoder.device.type == "meta"
    assert torch.equal(videos(pipeline, "a dog"), plain)
