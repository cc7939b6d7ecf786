"""STDiT as one of diffusers' models: gradient checkpointing, precision of parts, attention backends, outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import FirstBlockCacheConfig, TextKVCacheConfig
from diffusers.utils import is_accelerate_available

from stdit_model import STDiT, layers
from stdit_model.errors import SettingsError
from stdit_model.presets import VARIANTS

TIMESTEP_PATH = ("t_embedder.", "t_block.", "scale_shift_table")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing(variant: str, tiny: Callable, inputs: Callable) -> None:
    """The same gradients, of blocks that are computed twice."""
    plain, checkpointed = tiny(variant), tiny(variant)
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    calls = []
    checkpointed.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(*inputs()).square().mean().backward()
    assert len(calls) == 2
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    checkpointed.disable_gradient_checkpointing()
    checkpointed(*inputs()).mean().backward()
    assert len(calls) == 3


def test_a_cached_caption_has_gradients(tiny: Callable, inputs: Callable) -> None:
    """With gradients nothing is kept, so that a second backward has a graph of its own."""
    model = tiny()
    x, t, y, mask = inputs()
    text = model.encode_text(y, mask)
    for _ in range(2):
        model(x, t, text).mean().backward()
    assert model.blocks[0].cross_attn.kv_linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_path_of_the_timestep_stays_float32(tiny: Callable, tmp_path: Any, low_cpu_mem_usage: bool) -> None:
    tiny().save_pretrained(tmp_path)
    model = STDiT.from_pretrained(tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(model) is STDiT
    assert model.dtype == torch.bfloat16
    if low_cpu_mem_usage and is_accelerate_available():  # diffusers cannot otherwise
        for name, parameter in model.named_parameters():
            kept = any(part in name for part in TIMESTEP_PATH)
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_layerwise_casting_spares_it(tiny: Callable, inputs: Callable, relative: Callable) -> None:
    plain, cast = tiny(), tiny()
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert "blocks.0.attn.qkv.weight" in stored
    spared = (*TIMESTEP_PATH, "x_embedder.", "final_layer.")
    assert not [name for name in stored if any(part in name for part in spared)]
    with torch.no_grad():
        assert 0 < relative(cast(*inputs()), plain(*inputs())) < 0.2


def test_attention_backends(
    tiny: Callable, inputs: Callable, relative: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    with torch.no_grad():
        plain = model(*inputs())
        model.set_attention_backend("_native_math")
        monkeypatch.setattr(layers, "attention", lambda *_: pytest.fail("torch's choice of kernel"))
        assert relative(model(*inputs()), plain) < 1e-5
        monkeypatch.undo()
        model.reset_attention_backend()
        assert torch.equal(model(*inputs()), plain)


def test_return_dict(tiny: Callable, inputs: Callable) -> None:
    model = tiny()
    with torch.no_grad():
        assert torch.equal(model(*inputs(), return_dict=True).sample, model(*inputs()))


def test_caches_that_do_not_work_are_refused(tiny: Callable) -> None:
    with pytest.raises(SettingsError, match="TextKVCacheConfig does not work with STDiT: choose FirstBlockCacheConfig"):
        tiny().enable_cache(TextKVCacheConfig())
    with pytest.raises(SettingsError, match="skips blocks, and this model has one"):
        tiny(depth=1).enable_cache(FirstBlockCacheConfig())
    model = tiny()
    model.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    assert model.is_cache_enabled
    model.disable_cache()
    assert not model.is_cache_enabled
