"""bfloat16 and compilation."""

import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

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
        text = model.y_embedder(y.bfloat16())
        tokens = model.x_embedder(x.bfloat16())
        t0 = model.t_block(model.t_embedder(torch.tensor([997, 998]))).view(2, 6, -1)
        outputs = [model.blocks[0](tokens[:1], t0[i : i + 1], text[:1], mask[:1]) for i in range(2)]
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


@pytest.mark.parametrize(
    "variant", ["seq", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "seq")]
)
def test_the_whole_model_is_one_graph(variant, tiny, inputs, relative) -> None:
    """Under autocast to bfloat16, gradients included; positions are looked up, not computed in the graph."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return aot_autograd(fw_compiler=boxed_nop)(graph, example)

    model, plain = tiny(variant, depth=1), tiny(variant, depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, t, y, mask = inputs()
    outputs = []
    for run in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(x, t, y, mask))
        outputs[-1].float().square().mean().backward()
    assert outputs[1].dtype == torch.bfloat16
    assert relative(outputs[1].detach(), outputs[0].detach()) == 0
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative(parameter.grad, expected.grad) < 0.02
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    for table in ("spatial_positions", "temporal_positions"):
        assert any(f"stdit_model.{table}" in name for name in targets)
    assert not {name for name in targets if "numpy" in name or "float64" in name}


@needs_compiler
@pytest.mark.slow
def test_the_whole_model_compiled_in_bfloat16(tiny, inputs, relative) -> None:
    model, compiled = tiny(), torch.compile(tiny(), fullgraph=True)
    for size in ((2, 4, 3, 8, 8), (2, 4, 2, 8, 12)):
        x, t, y, mask = inputs(size)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert relative(compiled(x, t, y, mask), model(x, t, y, mask)) < 0.05


@needs_compiler
@pytest.mark.slow
def test_a_block_compiled_in_bfloat16(tiny, inputs, relative) -> None:
    model, compiled = tiny(), tiny()
    compiled.compile_repeated_blocks(fullgraph=True)
    x, t, y, mask = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(compiled(x, t, y, mask).detach(), model(x, t, y, mask).detach()) < 0.05
