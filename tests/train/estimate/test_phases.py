"""What a run is said to hold beside its steps, against what lives at once when it does it; and its main memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from stdit_data.buckets import Bucket
from stdit_model import STDiT
from stdit_model.causal_vae.video_autoencoder import vae_class
from stdit_model.flops import forward_bytes
from stdit_model.presets import VARIANTS
from stdit_model.video_vae import decode, encode_moments, latent_shape
from stdit_train.config.load import from_dict, load_stage, set_values, to_dict
from stdit_train.config.schema import OptimizerConfig, TrainConfig
from stdit_train.distributed.dims import ParallelDims
from stdit_train.distributed.mesh import build_mesh
from stdit_train.distributed.parallelize import build_sharded_model
from stdit_train.estimate.fit import refusal
from stdit_train.estimate.frozen import decoding_bytes, encoding_bytes, text_bytes
from stdit_train.estimate.muon import muon_memory
from stdit_train.estimate.plan import dry_run
from stdit_train.estimate.sampling import peak, sampling_phases
from stdit_train.estimate.training import describe, estimate_run
from stdit_train.estimate.training import to_dict as estimate_to_dict
from stdit_train.hardware import GIB
from stdit_train.optim.optimizers import build_optimizers

VAES: list[dict[str, Any]] = [
    {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2},  # as sd-vae-ft is made, a quarter as wide
    {"block_out_channels": (16, 32), "layers_per_block": 1},
    {"block_out_channels": (8, 64), "layers_per_block": 2},  # the second level is the widest
]
TEXTS: list[dict[str, Any]] = [
    {"d_model": 256, "d_ff": 640, "d_kv": 64, "num_heads": 4, "feed_forward_proj": "gated-gelu"},  # as T5-XXL is made
    {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4},  # attention takes more
]


@pytest.mark.parametrize("vae", VAES, ids=lambda vae: str(vae["block_out_channels"]))
def test_encoding_and_decoding(vae: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL

    shape, levels = Bucket(3, 64, 96), len(vae["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoencoderKL(**vae, **kinds, latent_channels=4, norm_num_groups=8)
        video, pixels = torch.empty(2, 3, *shape), 2 * 3 * 3 * 64 * 96
        latents = torch.empty(2, 4, 3, *(side // 2 ** (levels - 1) for side in shape[1:]))
        # The estimate has the pixels too, as they were and in float32; here they are there before.
        encoding = peak(lambda: encode_moments(model, video)) + 5 * pixels
        decoding = peak(lambda: decode(model, latents))
    assert encoding_bytes(vae, 2, shape) == pytest.approx(encoding, rel=0.05)
    assert decoding_bytes(vae, 2, shape) == pytest.approx(decoding, rel=0.05)
    long = Bucket(64, 64, 96)
    assert encoding_bytes(vae, 2, long) < 6 * encoding_bytes(vae, 2, shape)  # 16 frames at once
    video_vae = {**vae, "temporal_compression_ratio": 4}
    assert encoding_bytes(video_vae, 2, long) == pytest.approx(128 / 6 * encoding_bytes(vae, 2, shape), rel=0.01)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("AutoencoderKLWan", {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
        ("CausalVideoVAE", {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}),
    ],
)
def test_other_vaes_are_run_on_fake_tensors(name: str, sizes: dict[str, Any]) -> None:
    values, shape = {**sizes, "_class_name": name}, Bucket(9, 32, 32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = vae_class(name)(**sizes)
        video, latents = torch.empty(2, 3, *shape), torch.empty(2, *latent_shape(model, *shape))
        encoding = peak(lambda: encode_moments(model, video)) + 5 * 2 * 3 * 9 * 32 * 32
        decoding = peak(lambda: decode(model, latents))
    assert encoding_bytes(values, 2, shape) == pytest.approx(encoding, rel=0.01)
    assert decoding_bytes(values, 2, shape) == pytest.approx(decoding, rel=0.01)
    model_arguments = {
        "in_channels": latents.shape[1],
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "caption_channels": 32,
    }
    text = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 50}
    whole = sampling_phases(model_arguments, (1, *latents.shape[1:]), itemsize=4, text_encoder=text, vae=values)[2]
    assert whole.working == pytest.approx(decoding_bytes(values, 1, shape), rel=0.2)  # with a copy to write


@pytest.mark.parametrize("text", TEXTS, ids=["T5", "small"])
def test_captions(text: dict[str, Any]) -> None:
    from transformers import T5Config, T5EncoderModel

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = T5EncoderModel(T5Config(**text, num_layers=2, vocab_size=50)).eval()
        tokens, mask = torch.empty(2, 8, 120, dtype=torch.int64)
        found = peak(lambda: model(input_ids=tokens, attention_mask=mask))
    assert found < 1.05 * text_bytes(text, 8, 120, itemsize=4) < 1.5 * found
    if "feed_forward_proj" in text:
        assert text_bytes(text, 8, 120, itemsize=4) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_a_forward_without_gradients(variant: str, half: bool) -> None:
    arguments = {"variant": variant, "hidden_size": 96, "depth": 4, "num_heads": 4, "caption_channels": 32}
    shape = (2, 4, 8, 16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = STDiT(**arguments, model_max_length=8).requires_grad_(False)
        inputs = torch.empty(shape), torch.empty(2), torch.empty(2, 8, 32), torch.empty(2, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = peak(lambda: model(*inputs))
    paper = forward_bytes({**arguments, "model_max_length": 8}, shape, itemsize=2 if half else 4)
    largest = 2 * 4 * 96 * 96 if half else 0  # a weight, cast
    assert paper + largest == pytest.approx(found, rel=0.05)


@pytest.fixture
def group() -> Iterator[None]:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this torch has no fake group")
    dist.init_process_group("fake", rank=0, world_size=4, store=fake.FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("replicate", [1, 4], ids=["shards", "whole"])
def test_muon(group: None, replicate: int) -> None:
    """Its state, and the buffers of its step, over four processes of which this is the first."""
    arguments = STDiT.arguments({"hidden_size": 96, "depth": 3, "num_heads": 4, "caption_channels": 32})
    dims, cpu = ParallelDims(4, replicate), torch.device("cpu")
    model = build_sharded_model(arguments, build_mesh(dims, cpu), cpu)
    muon, _ = build_optimizers(model, OptimizerConfig("muon"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon.step()
    paper = muon_memory(arguments, dims.shard, itemsize=4)
    state = sum(entry["momentum_buffer"].to_local().nbytes for entry in muon.state.values())
    assert 4 * paper.elements == pytest.approx(state, rel=0.01)
    assert paper.buffers == pytest.approx(peak(muon.step), rel=0.15)


def test_the_peak_is_the_largest_phase() -> None:
    """What a phase needs is not added to another's; without clips to encode or captions it is none."""
    config = set_all(load_stage("64x512"), {"micro_batch": 1, "data.source": "clips"})
    estimate = estimate_run(config, 2**50)
    assert list(estimate.phases) == ["training step", "VAE encoding", "text encoding", "optimizer step", "sampling"]
    assert estimate.total_memory == max(estimate.phases.values()) == estimate.phases[estimate.peak_phase]
    assert estimate.phases["training step"] == estimate.step_memory
    validated = estimate_run(set_all(config, {"data.validation": 0.1}), 2**50)
    assert "validation" in validated.phases
    # 16 frames of 512x512 in float32: five maps of 128 channels, and clips of 64 frames
    resting = estimate.phases["VAE encoding"] - estimate.memory["gradients"] - 2 * estimate.memory["EMA"]
    resting -= estimate.memory["optimizer"] + estimate.memory["VAE and text encoder"]
    assert resting == 5 * 128 * 4 * 16 * 512 * 512 + 5 * 3 * 64 * 512 * 512
    small = set_all(config, {"model.preset": "S/2", "model.depth": 1, "activation_checkpointing": True})
    crowded = estimate_run(small, 2**50)
    assert crowded.peak_phase != "training step"
    told = refusal(crowded, 2**30)
    assert told is not None
    assert f"for {crowded.peak_phase}; a training step" in told


def test_prompts_are_shared() -> None:
    config = replace(load_stage("64x512"), micro_batch=4)
    alone, four = (estimate_run(config, 2**50, ParallelDims(size, size)).phases["sampling"] for size in (1, 4))
    one_at_once = estimate_run(replace(config, micro_batch=1), 2**50).phases["sampling"]
    assert alone > four == pytest.approx(one_at_once, rel=0.01)


def test_main_memory() -> None:
    """Of clips: two steps and what is read ahead, at least a step; on a node, that of its eight processes."""
    config = replace(load_stage("16x512"), micro_batch=4)
    config = set_all(config, {"data.source": "clips"})
    eight = estimate_run(config, 2**50, ParallelDims(8))
    clip, drawn = 3 * 16 * 512 * 512, 2 * 4 * 4 * 16 * 64 * 64
    step = 16 * (2**26 + 4 * drawn)  # micro-batches of 50 MB of pixels, which are pinned in powers of two
    assert config.global_batch == 512 and 4 * clip < 2**26
    assert eight.host["clips"] == 2 * step + max(step, 2**30)
    assert eight.host["copy for a checkpoint"] == 2 * eight.memory["EMA"] + eight.memory["optimizer"]
    assert eight.host_per_node == 8 * sum(eight.host.values())
    assert estimate_run(config, 2**50, ParallelDims(16)).host_per_node < 8.1 * sum(eight.host.values())
    published = estimate_run(set_all(config, {"data.source": "shapes"}), 2**50, ParallelDims(8))
    assert published.host == eight.host  # the stage as published, without data yet
    drawn_clips = estimate_run(set_all(config, {"data.source": "shapes", "data.vae": "demo"}), 2**50, ParallelDims(8))
    assert drawn_clips.host["clips"] > 3 * eight.host["clips"]  # in float32
    less = estimate_run(set_all(config, {"data.prefetch_bytes": 0, "checkpoint_async": False}), 2**50, ParallelDims(8))
    assert less.host["clips"] == 3 * step
    assert "copy for a checkpoint" not in less.host


def test_phases_and_main_memory_are_shown() -> None:
    report = dry_run(replace(load_stage("16x256"), micro_batch=1), 8, "h100")
    rows, told = report.rows, estimate_to_dict(report.estimate, 80 * GIB)
    for name, size in report.estimate.phases.items():
        assert rows[f"  {name}"] == f"{size / GIB:.2f} GiB"
    assert "on a node of 8" in rows["main memory"]
    assert told["phases"] == report.estimate.phases
    assert told["main_memory_per_node"] == 8 * sum(told["main_memory"].values())
    lines = "\n".join(describe(report.estimate))
    assert f"at the peak, {report.estimate.peak_phase}" in lines
    assert "main memory" in lines


def set_all(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    return from_dict(set_values(to_dict(config), values))
