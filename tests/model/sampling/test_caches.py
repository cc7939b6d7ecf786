"""Caches of diffusers on a pipeline: parts of the model are skipped, and the video stays near the plain one."""

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, MagCacheConfig
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from stdit_model import STDiTPipeline
from stdit_model.errors import SettingsError
from stdit_model.sampling.caches import cache_config, parse_cache

STEPS = 12
Make = Callable[[], STDiTPipeline]


def sample(pipeline: STDiTPipeline, **options: Any) -> tuple[Tensor, Counter[str]]:
    """The latents, and how often each kind of layer of the last block ran."""
    ran: Counter[str] = Counter()
    handles = []
    for name, layer in pipeline.transformer.blocks[-1].named_children():
        inner = {"attn": "qkv", "attn_temp": "qkv", "cross_attn": "q_linear", "mlp": "fc1"}.get(name)
        if inner is not None:
            handles.append(
                getattr(layer, inner).register_forward_hook(lambda *_, kind=name: ran.update([kind]))  # type: ignore[misc]
            )
    generator = torch.Generator().manual_seed(0)
    latents = pipeline("a cat", generator=generator, num_inference_steps=STEPS, output_type="latent", **options).frames
    for handle in handles:
        handle.remove()
    return latents, ran


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("cache", ["first-block:0.5", "pab", "pab:3", "taylorseer"])
def test_a_cache(make_pipeline: Make, cache: str) -> None:
    pipeline = make_pipeline()
    plain, all_of_it = sample(pipeline)
    assert set(all_of_it.values()) == {STEPS}
    pipeline.transformer.enable_cache(cache_config(cache, lambda: pipeline.current_timestep))
    cached, ran = sample(pipeline)
    assert 0 < ran["attn"] < STEPS
    assert 0 < ran["attn_temp"] < STEPS
    assert 0 < ran["cross_attn"] < STEPS
    assert (ran["mlp"] == STEPS) == cache.startswith("pab")
    assert 0 < apart(cached, plain) < 0.5
    again, _ = sample(pipeline)  # nothing is left of the call before
    assert torch.equal(again, cached)
    pipeline.transformer.disable_cache()
    assert torch.equal(sample(pipeline)[0], plain)


def test_magcache_is_calibrated_and_used(make_pipeline: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = make_pipeline()
    plain, _ = sample(pipeline)
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    assert torch.equal(sample(pipeline)[0], plain)
    ratios = [float(ratio) for ratio in capsys.readouterr().out.split("[")[-1].split("]")[0].split(",")]
    assert len(ratios) == STEPS
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(MagCacheConfig(threshold=1.0, mag_ratios=ratios, num_inference_steps=STEPS))
    cached, ran = sample(pipeline)
    assert 0 < ran["mlp"] < STEPS
    assert 0 < apart(cached, plain) < 0.5


def test_fastercache_computes_the_prompts_half(make_pipeline: Make) -> None:
    """Where the unconditional half is skipped, it is approximated, and the prompt's half is what it would have been."""
    pipeline = make_pipeline()
    outputs: list[Tensor] = []
    rows: list[int] = []
    pipeline.transformer.register_forward_hook(lambda *_: outputs.append(_[-1]))
    pipeline.transformer.blocks[0].mlp.register_forward_hook(lambda *_: rows.append(len(_[-1])))
    plain, _ = sample(pipeline)
    expected, outputs[:], rows[:] = list(outputs), [], []

    config = cache_config("fastercache:3", lambda: pipeline.current_timestep)
    config.spatial_attention_block_skip_range = 1  # no attention is skipped
    pipeline.transformer.enable_cache(config)
    cached, _ = sample(pipeline)
    assert rows == [2] * 10 + [1] * 2  # two of the three timesteps below 641
    first = rows.index(1)
    for output, other in zip(outputs[:first], expected, strict=False):
        assert torch.equal(output, other)
    unconditional, conditional = outputs[first]
    torch.testing.assert_close(conditional, expected[first][1], rtol=1e-4, atol=1e-5)
    assert 0 < apart(unconditional, expected[first][0]) < 0.2
    assert apart(unconditional, expected[first][0]) < apart(unconditional, expected[first][1])
    assert 0 < apart(cached, plain) < 0.5


def test_fastercache_needs_guidance(make_pipeline: Make) -> None:
    pipeline = make_pipeline()
    pipeline.transformer.enable_cache(cache_config("fastercache", lambda: pipeline.current_timestep))
    cached, ran = sample(pipeline)
    assert 0 < ran["attn"] < STEPS
    assert 0 < ran["attn_temp"] < STEPS
    assert torch.equal(sample(pipeline)[0], cached)  # nothing is left of the call before
    for options in (
        {"guidance_scale": 1.0},
        {"guidance_stop": 0.5},
        {"num_frames": 6, "window": 4, "overlap": 2},
        {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
    ):
        with pytest.raises(SettingsError, match="it needs guidance in every step and window"):
            sample(pipeline, **options)


@pytest.mark.parametrize("cache", ["first-block:0.5", "pab", "taylorseer"])
def test_guidance_that_stops_and_windows(make_pipeline: Make, cache: str) -> None:
    """The batch halves in between, and another window begins: what is kept is of neither."""
    pipeline = make_pipeline()
    options: dict[str, Any] = {"num_frames": 6, "window": 4, "guidance_start": 0.2, "guidance_stop": 0.7}
    plain, _ = sample(pipeline, **options)
    pipeline.transformer.enable_cache(cache_config(cache, lambda: pipeline.current_timestep))
    cached, _ = sample(pipeline, **options)
    assert cached.isfinite().all()
    assert apart(cached, plain) < 1.0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_keep_the_caption(make_pipeline: Make) -> None:
    pipeline = make_pipeline()
    plain, _ = sample(pipeline)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    compiled = pipeline("a cat", generator=generator, num_inference_steps=STEPS, output_type="latent").frames
    assert apart(compiled, plain) < 1e-4


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("teacache", "choose first-block, pab, fastercache, taylorseer"),
        ("first-block:x", "a relative change above 0"),
        ("first-block:0", "a relative change above 0"),
        ("pab:1", "2 to 100 steps, as in pab:2"),
        ("taylorseer:2.5", "2 to 100 steps"),
    ],
)
def test_values_that_make_no_sense(cache: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_cache(cache)


def test_from_pipe(make_pipeline: Make) -> None:
    pipeline = make_pipeline()
    other = STDiTPipeline.from_pipe(pipeline, num_inference_steps=2)
    assert other.transformer is pipeline.transformer
    assert other.vae is pipeline.vae
    assert (other.config.num_inference_steps, other.config.num_frames) == (2, 4)
    half = make_pipeline()
    half.transformer.to(torch.bfloat16)
    assert STDiTPipeline.from_pipe(half).transformer.dtype == torch.bfloat16


def test_diffusers_own_loader(make_pipeline: Make, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    diffusers.utils.logging.disable_propagation()
    assert type(loaded) is STDiTPipeline
    assert "Expected types" not in caplog.text
    assert loaded.vae_scale_factor == 8
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded)[0], sample(pipeline)[0])
