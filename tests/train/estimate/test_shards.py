"""What a process is said to hold of a sharded run, against torch's own tracker of FSDP2's memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stdit_train.config.schema import OptimizerConfig
from stdit_train.distributed.dims import ParallelDims
from stdit_train.distributed.mesh import build_mesh
from stdit_train.distributed.parallelize import build_sharded_model, set_gradient_reduction
from stdit_train.estimate.parallel import gathered_bytes, sharded_memory
from stdit_train.optim.optimizers import build_optimizers

WORLD = 8
MODEL: dict[str, Any] = {"num_heads": 6, "caption_channels": 64, "model_max_length": 8}
SHAPE = (2, 4, 4, 16, 16)


@pytest.fixture
def group() -> Iterator[None]:
    """Eight processes of which this is the first; the others do not exist, and messages change nothing."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this torch has no fake group")
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=fake.FakeStore())
    yield
    dist.destroy_process_group()


def tracked(
    arguments: dict[str, Any], dims: ParallelDims, *, dtype: torch.dtype | None, checkpointing: bool, parts: int
):
    """The peak of the second step, by kind of tensor: parameters, activations and so on."""
    tools = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker", reason="this torch does not track FSDP2")
    cpu = torch.device("cpu")
    model = build_sharded_model(arguments, build_mesh(dims, cpu), cpu, dtype=dtype, checkpointing=checkpointing)
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    inputs = torch.randn(SHAPE), torch.rand(2), torch.randn(2, 8, 64), torch.ones(2, 8)
    tracker = tools.FSDPMemTracker(model, optimizer)
    tracker.track_inputs(inputs)
    for _ in range(2):  # the optimizer's state is made in the first
        with tracker:
            for part in range(parts):
                tracker.reset_mod_stats()
                set_gradient_reduction(model, last=part == parts - 1, once=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                    model(*inputs).float().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak = tracker.get_tracker_snapshot("peak")
    return {getattr(kind, "name", kind): size for kind, size in peak[cpu].items()}


@pytest.mark.parametrize(
    ("replicate", "width", "dtype", "checkpointing", "parts"),
    [
        (1, 192, None, False, 1),
        (2, 384, None, False, 1),  # HSDP
        (1, 384, None, True, 1),  # a block's gradients outweigh its activations
        (1, 384, None, False, 2),  # gradients whole until the second micro-batch
        (1, 384, torch.bfloat16, False, 1),
    ],
    ids=["shards", "replicas of shards", "checkpointing", "two micro-batches", "bfloat16"],
)
def test_torch_tracks_what_is_estimated(
    group: None, replicate: int, width: int, dtype: torch.dtype | None, checkpointing: bool, parts: int
) -> None:
    dims, arguments = ParallelDims(WORLD, replicate), {**MODEL, "hidden_size": width, "depth": 4}
    found = tracked(arguments, dims, dtype=dtype, checkpointing=checkpointing, parts=parts)
    itemsize = 4 if dtype is None else 2
    paper = sharded_memory(arguments, dims, SHAPE, itemsize=itemsize, checkpointing=checkpointing, unreduced=parts > 1)
    assert paper["weights"] == found["SHARDED_PARAM"]
    assert paper["optimizer"] == pytest.approx(found["OPT"], rel=1e-3)  # and counts of steps
    assert gathered_bytes(arguments, itemsize) == pytest.approx(
        found["UNSHARDED_PARAM"] + found["ALL_GATHER"], rel=0.01
    )
    if parts > 1:
        assert paper["gradients"] == pytest.approx(found["UNSHARDED_GRAD"], rel=1e-3)
    assert paper["activations"] == pytest.approx(found["ACT"] + found["TEMP"], rel=0.12)
    passing = paper["activations"], paper["gradients"]
    lasting = paper["weights"] + paper["optimizer"] + paper["gathered"]
    assert lasting + (max(passing) if parts == 1 else sum(passing)) == pytest.approx(found["Total"], rel=0.06)
