"""The network itself: sizes, parameters, masks, cached text, and any T, H, W with one set of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_model import PRESETS, VARIANTS, STDiT
from stdit_model.flops import parameters


def meta(*args, **kwargs) -> STDiT:
    with torch.device("meta"):
        return STDiT.from_preset(*args, **kwargs)


def test_parameters_of_the_published_model() -> None:
    model = meta("XL/2")
    assert model.num_parameters() == 759_620_768
    temporal = sum(p.numel() for name, p in model.named_parameters() if ".attn_temp." in name)
    assert model.num_parameters() - temporal == 610_856_096


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, variant) -> None:
    model = meta(name, variant=variant)
    assert parameters(PRESETS[name] | {"variant": variant}).total == model.num_parameters()
    assert len(model.blocks) == PRESETS[name]["depth"]


def test_initial_values() -> None:
    """A fresh model predicts zero, and its temporal attention adds nothing."""
    model = STDiT.from_preset("demo")
    assert all(block.attn_temp.proj.weight.abs().max() == 0 for block in model.blocks)
    assert all(block.attn_temp.qkv.weight.abs().max() > 0 for block in model.blocks)
    with torch.no_grad():
        output = model(torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 16, 64))
    assert output.abs().max() == 0


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'XXL/2'.*XL/2"):
        STDiT.from_preset("XXL/2")
    with pytest.raises(ValueError, match=r"unknown variant 'serial'.*parallel"):
        STDiT(variant="serial", depth=1, hidden_size=32, num_heads=2)
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        STDiT(depth=1, hidden_size=32, num_heads=5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_one_set_of_weights_for_every_size(variant, patch, tiny, inputs) -> None:
    model = tiny(variant, patch_size=patch)
    for size in [(2, 4, 4), (4, 8, 4), (6, 4, 12)]:
        x, t, y, mask = inputs((2, 4, *size))
        with torch.no_grad():
            assert model(x, t, y, mask).shape == (2, 8, *size)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    patch=st.sampled_from([(1, 2, 2), (2, 2, 2)]),
    variant=st.sampled_from(VARIANTS),
)
def test_any_size_that_the_patch_divides(tiny, size, patch, variant) -> None:
    model = tiny(variant, patch_size=patch)
    x, t, y = torch.zeros(1, 4, *size), torch.tensor([1.0]), torch.zeros(1, 3, 24)
    for axis, value, step in zip(("frames T", "height H", "width W"), size, patch, strict=True):
        if value % step:
            with pytest.raises(ValueError, match=f"{axis} of the latents is {value}.*patch size {step}"):
                model(x, t, y)
            return
    with torch.no_grad():
        assert model(x, t, y).shape == (1, 8, *size)


def test_wrong_channels(tiny) -> None:
    with pytest.raises(ValueError, match=r"expected latents of shape \[B, 4, T, H, W\], not \[1, 3, 2, 4, 4\]"):
        tiny()(torch.zeros(1, 3, 2, 4, 4), torch.tensor([1.0]), torch.zeros(1, 3, 24))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_of_the_text_changes_nothing(variant, tiny, inputs, relative) -> None:
    model = tiny(variant)
    x, t, y, mask = inputs()
    longer = torch.cat([y, 100 * torch.randn(2, 9, 24)], dim=1)
    with torch.no_grad():
        expected = model(x, t, y, mask)
        padded = model(x, t, longer, torch.cat([mask, mask.new_zeros(2, 9)], dim=1))
        alone = model(x[:1], t[:1], y[:1, : int(mask[0].sum())])
    assert relative(padded, expected) < 1e-6
    assert relative(alone, expected[:1]) < 1e-6


def test_a_caption_without_tokens(tiny, inputs) -> None:
    """A fully masked row stays finite, its gradients too."""
    model = tiny()
    x, t, y, mask = inputs()
    output = model(x, t, y, torch.zeros_like(mask))
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_text(variant, tiny, inputs, relative) -> None:
    """Keys and values computed once give what the plain forward gives, at every step."""
    model = tiny(variant)
    x, _, y, mask = inputs()
    with torch.no_grad():
        cache = model.encode_text(y, mask)
        for t in (999.0, 500.0, 0.0):
            timestep = torch.full((2,), t)
            assert relative(model(x, timestep, cache), model(x, timestep, y, mask)) < 1e-6
    with pytest.raises(ValueError, match="TextCache"):
        model(x, timestep, cache, mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant, tiny, inputs) -> None:
    model = tiny(variant)
    x, t, y, mask = inputs()
    (model(x, t, y, mask) ** 2).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_see_each_other(variant, tiny, inputs) -> None:
    model = tiny(variant)
    x, t, y, mask = inputs()
    changed = x.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        difference = (model(changed, t, y, mask) - model(x, t, y, mask)).abs().amax((0, 1, 3, 4))
    assert (difference[1:] > 1e-5).all()


def test_null_caption(tiny) -> None:
    model = tiny()
    assert torch.equal(model.null_caption(3, 5)[2], model.y_embedder.y_embedding[:5])
    with pytest.raises(ValueError, match="13 tokens: this model has 12"):
        model.null_caption(1, 13)


def test_position_scales(tiny, inputs, relative) -> None:
    """The configuration's scales are the defaults of forward's."""
    model, scaled = tiny(), tiny(space_scale=0.5, time_scale=2 / 3)
    x, t, y, mask = inputs()
    with torch.no_grad():
        given_to_forward = model(x, t, y, mask, space_scale=0.5, time_scale=2 / 3)
        assert relative(given_to_forward, scaled(x, t, y, mask)) == 0
        assert relative(given_to_forward, model(x, t, y, mask)) > 1e-3
