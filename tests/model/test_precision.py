"""bfloat16 and compilation."""

import shutil

import pytest
import torch

from stdit_model import VARIANTS


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_neighbouring_timesteps_stay_apart_in_bfloat16(cast, tiny) -> None:
    """bfloat16 has no 997: it rounds to 996, as 998 does to 1000. The embedding must never be in it."""
    model = tiny().to(torch.bfloat16) if cast == "weights" else tiny()
    block = model.blocks[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        embedded = model.t_embedder(torch.tensor([997, 998]))
        modulation = model.t_block(embedded).view(2, 6, -1) + block.scale_shift_table.float()
    for vectors in (embedded, modulation):
        assert vectors.dtype == torch.float32
        assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    # Not only bits that bfloat16 would drop anyway: the difference is what float32 weights give.
    reference = tiny()
    with torch.no_grad():
        expected = reference.t_embedder(torch.tensor([997.0, 998.0]))
    assert torch.allclose(embedded[0] - embedded[1], expected[0] - expected[1], rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_bfloat16_follows_float32(variant, cast, tiny, inputs, relative) -> None:
    x, t, y, mask = inputs()
    with torch.no_grad():
        expected = tiny(variant)(x, t, y, mask)
        if cast == "weights":
            output = tiny(variant).to(torch.bfloat16)(x.bfloat16(), t, y.bfloat16(), mask)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                output = tiny(variant)(x, t, y, mask)
    assert output.dtype == torch.bfloat16
    assert relative(output, expected) < 0.05


def test_modulation_keeps_neighbouring_timesteps_apart(tiny, inputs) -> None:
    """What differs between 997 and 998 in float32 still differs after a block in bfloat16."""
    model = tiny().to(torch.bfloat16)
    x, _, y, mask = inputs()
    with torch.no_grad():
        text = model.encode_text(y.bfloat16(), mask)
        tokens = model.x_embedder(x.bfloat16())
        t0 = model.t_block(model.t_embedder(torch.tensor([997, 998]))).view(2, 6, -1)
        outputs = [
            model.blocks[0](tokens[:1], t0[i : i + 1], [kv[:1] for kv in text.keys_values[0]], text.mask_BL[:1])
            for i in range(2)
        ]
    assert not torch.equal(*outputs)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")


@needs_compiler
def test_compiled_blocks(tiny, inputs, relative) -> None:
    """Each block alone, without graph breaks, equals eager."""
    model, compiled = tiny(), tiny()
    compiled.compile_repeated_blocks(fullgraph=True)
    x, t, y, mask = inputs()
    with torch.no_grad():
        assert relative(compiled(x, t, y, mask), model(x, t, y, mask)) < 1e-5


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_training(variant, tiny, inputs, relative) -> None:
    """The same for all variants, and for their gradients."""
    model, compiled = tiny(variant), tiny(variant)
    compiled.compile_repeated_blocks(fullgraph=True)
    x, t, y, mask = inputs()
    outputs = [m(x, t, y, mask) for m in (model, compiled)]
    assert relative(outputs[1].detach(), outputs[0].detach()) < 1e-5
    for output in outputs:
        output.square().mean().backward()
    for (name, plain), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(plain.grad, other.grad, rtol=1e-4, atol=1e-5 * plain.grad.abs().max()), name
