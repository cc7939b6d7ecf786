"""What is put on a model before it is trained changes what it costs and not what it computes; and its trace."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stdit_model import STDiT
from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, load_stage
from stdit_train.config.schema import Checkpointing, TrainConfig
from stdit_train.distributed import parallelize
from stdit_train.distributed.parallelize import _warn_of_limit, apply_ac, apply_compile, clip_shapes
from stdit_train.tracking.profiler import WARM_UP


def made(checkpointing: Checkpointing, compiled: bool, variant: str = "seq") -> tuple[dict[str, Tensor], int]:
    """Gradients, and FLOPs of forward and backward."""
    torch.manual_seed(0)
    model = STDiT(variant, depth=2, hidden_size=32, num_heads=2, caption_channels=8, model_max_length=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    apply_ac(model, checkpointing)
    if compiled:
        apply_compile(model)
    x, y = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 8)
    with nullcontext() if compiled else FlopCounterMode(display=False) as count:  # nothing compiles under a counter
        model(x, torch.tensor([3.0, 700.0]), y).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, count.get_total_flops() if count else 0


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["seq", "dit"])
def test_checkpointing_computes_anew_what_it_says(variant: str) -> None:
    (plain, once), (selective, some), (full, twice) = (
        made(kind, False, variant) for kind in (False, "selective", True)
    )
    assert_same(selective, plain)
    assert_same(full, plain)
    assert some == once < twice  # selective: no product twice


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = made(False, False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    assert_same(made(True, True)[0], plain)


SHAPES = [(1, 2, 4, 4), (2, 3, 4, 4), (1, 4, 4, 6), (3, 2, 6, 4), (2, 1, 6, 6), (1, 5, 8, 4)]  # B, T, H, W


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo with small limits, which are put back afterwards."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    _warn_of_limit.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(
        recompile_limit=2, accumulated_recompile_limit=2, fail_on_recompile_limit_hit=False
    ):
        yield


@torch.no_grad()
def predicted(shapes: int | None) -> list[Tensor]:
    """Predictions for clips of all `SHAPES`, twice, by a model compiled for a number of them, or not compiled."""
    torch.manual_seed(0)
    model = STDiT("seq", depth=3, hidden_size=32, num_heads=2, caption_channels=8, model_max_length=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if shapes is not None:
        apply_compile(model, shapes)
    inputs = [(torch.randn(b, 4, *size), torch.full((b,), 7.0), torch.randn(b, 4, 8)) for b, *size in SHAPES]
    return [model(*values) for values in inputs + inputs]


@pytest.mark.slow
def test_each_shape_of_clips_is_compiled_once(limits: None, caplog: pytest.LogCaptureFixture) -> None:
    found, expected = predicted(len(SHAPES)), predicted(None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(SHAPES)  # the first block, and the others
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "limit" not in caplog.text
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager)


def test_shapes_beyond_the_limit_are_told_once(
    limits: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six shapes the limit has room for one; the others are right, too."""
    monkeypatch.setattr(parallelize, "GRAPHS", 2)
    found, expected = predicted(1), predicted(None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert caplog.text.count("compiled 2 times, the limit") == 1
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager)


def test_every_bucket_is_a_shape() -> None:
    config = load_stage("16x256", {"data.source": "clips", "data.buckets": ["16x256x256", "1x512x512"]})
    assert (clip_shapes(config), clip_shapes(load_stage("16x256"))) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_really_compiled_blocks_compute_the_same(checkpointing: Checkpointing) -> None:
    torch._dynamo.reset()
    assert_same(made(checkpointing, True)[0], made(False, False)[0])


def test_a_run_leaves_a_trace(small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, steps=WARM_UP + 1, profile=1, activation_checkpointing="selective")
    run = RunFolder(tmp_path / "run")
    run.create(config)
    build_trainer(config, run, NullCallback()).train()
    (file,) = (run.path / "profile").iterdir()
    events = json.loads(file.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    assert {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")} == {
        f"ProfilerStep#{WARM_UP}"
    }


def test_settings_that_make_no_sense() -> None:
    assert load_stage("demo", {"activation_checkpointing": "selective"}).activation_checkpointing == "selective"
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        load_stage("demo", {"activation_checkpointing": "some"})
    with pytest.raises(ConfigError, match="profile: input should be greater than or equal to 0, not -1"):
        load_stage("demo", {"profile": -1})
