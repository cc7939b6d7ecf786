"""FSDP2 on one process beside the plain model: what its hooks and copies of weights cost."""

from functools import partial

import torch
import torch.distributed as dist
from benchmarks.gpu.setup import Case, Setup, TrainStep, Values

TITLE = "FSDP2 on one GPU beside the plain model: a training step in bf16, 16x256"
BATCH = 4


def cases(setup: Setup) -> list[Case]:
    return [
        Case(f"{'FSDP2' if sharded else 'plain'}, checkpointing full", partial(measure, setup, sharded), rank=1)
        for sharded in (False, True)
    ]


def measure(setup: Setup, sharded: bool) -> Values:
    from stdit_train.distributed.dims import ParallelDims
    from stdit_train.distributed.mesh import build_mesh
    from stdit_train.distributed.parallelize import apply_ac, build_sharded_model

    if not sharded:
        model = setup.model()
        apply_ac(model, True)
        return step_values(setup, TrainStep(setup, model))
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(ParallelDims(1), setup.device)
        model = build_sharded_model(setup.arguments(), mesh, setup.device, dtype=torch.bfloat16, checkpointing=True)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                getattr(tensor, "_local_tensor", tensor).normal_(std=0.02)
        return step_values(setup, TrainStep(setup, model))
    finally:
        dist.destroy_process_group()


def step_values(setup: Setup, step: TrainStep) -> Values:
    batch = 1 if setup.tiny else BATCH
    inputs = setup.inputs(setup.shape("16x256", batch))
    setup.forget_peak()
    seconds = setup.timed(lambda: step(inputs))
    return {"micro-batch": batch, "s/step": seconds, "samples/s": batch / seconds, "peak GiB": setup.peak_gib()}
