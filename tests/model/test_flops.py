"""The formulas against what torch counts."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stdit_model import VARIANTS
from stdit_model.flops import activation_bytes, forward_flops, train_flops

SHAPE, TEXT = (2, 4, 6, 8, 12), 12
CONFIGS = [{}, {"patch_size": (2, 2, 2), "mlp_ratio": 2.5, "learn_sigma": False, "depth": 3}]


def counted(run) -> int:
    """FLOPs of a call, attention as two matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def checkpoint_blocks(model) -> None:
    """Recompute each block in the backward."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "other sizes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops(variant, config, tiny, inputs) -> None:
    model = tiny(variant, **config)
    x, t, y, mask = inputs(SHAPE, TEXT)
    with torch.no_grad():
        assert forward_flops(model.config, SHAPE) == pytest.approx(counted(lambda: model(x, t, y, mask)), rel=0.01)
    trained = counted(lambda: model(x, t, y, mask).sum().backward())
    assert train_flops(model.config, SHAPE) == pytest.approx(trained, rel=0.01)
    checkpoint_blocks(model)
    trained = counted(lambda: model(x, t, y, mask).sum().backward())
    assert train_flops(model.config, SHAPE, checkpointing=True) == pytest.approx(trained, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_lengths_of_text(variant, tiny, inputs) -> None:
    model = tiny(variant)
    x, t, y, mask = inputs(SHAPE, 40)
    with torch.no_grad():
        expected = counted(lambda: model(x, t, y, mask))
    assert forward_flops(model.config, SHAPE, text_tokens=40) == pytest.approx(expected, rel=0.01)


def kept(model, run) -> int:
    """Bytes that a forward keeps for its backward, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "other sizes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations(variant, config, tiny, inputs) -> None:
    model = tiny(variant, hidden_size=96, **config)
    x, t, y, mask = inputs(SHAPE, TEXT)
    found = kept(model, lambda: model(x, t, y, mask))
    assert activation_bytes(model.config, SHAPE, itemsize=4) == pytest.approx(found, rel=0.03)


def test_activations_in_bfloat16(tiny, inputs) -> None:
    """Half the bytes; and float32 copies of the timestep's weights, which are few beside a clip's tokens."""
    model, shape = tiny(hidden_size=96).to(torch.bfloat16), (2, 4, 16, 16, 16)
    x, t, y, mask = inputs(shape, TEXT)
    found = kept(model, lambda: model(x.bfloat16(), t, y.bfloat16(), mask))
    assert activation_bytes(model.config, shape, itemsize=2) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_with_checkpointing(variant, tiny, inputs) -> None:
    """Between blocks only their inputs are kept; in the backward one block's activations come on top."""
    model = tiny(variant, hidden_size=96, depth=6)
    x, t, y, mask = inputs(SHAPE, TEXT)
    by_depth = [activation_bytes(model.config | {"depth": depth}, SHAPE, itemsize=4) for depth in range(1, 7)]
    one_block = max(after - before for before, after in pairwise(by_depth))  # the greatest, where kinds differ
    checkpoint_blocks(model)
    found = kept(model, lambda: model(x, t, y, mask)) + one_block
    assert activation_bytes(model.config, SHAPE, itemsize=4, checkpointing=True) == pytest.approx(found, rel=0.04)
