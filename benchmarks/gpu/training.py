"""A training step of XL/2 with cached latents and texts, at the largest micro-batch that fits."""

import time
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from benchmarks.gpu.setup import Case, Setup, TrainStep, Values, largest

from stdit_model import flops

TITLE = "Training XL/2: forward, backward and AdamW in bf16, cached latents"
Checkpointing = Literal["none", "selective", "full"]
SETTINGS: dict[Checkpointing, bool | Literal["selective"]] = {"none": False, "selective": "selective", "full": True}
LIMIT = 256  # largest micro-batch to try


def cases(setup: Setup) -> list[Case]:
    found = []
    for checkpointing in SETTINGS:
        for size in setup.latents:
            usual = checkpointing == ("full" if size == "64x512" else "none")  # what one would try first
            for compiled in (False, True):
                name = case_name(size, compiled, checkpointing)
                rank = 2 * (not usual) + compiled
                run = partial(measure, setup, size, checkpointing, compiled)
                found.append(Case(name, run, rank, compiled))
    return found


def case_name(size: str, compiled: bool, checkpointing: str) -> str:
    return f"{size}, {'compiled' if compiled else 'eager'}, checkpointing {checkpointing}"


def measure(setup: Setup, size: str, checkpointing: Checkpointing, compiled: bool) -> Values:
    """Time the step; eager at the largest micro-batch, compiled at the same one, so that the two can be compared."""
    step = TrainStep(setup, build(setup, checkpointing, compiled))
    eager = setup.results.get(("training", case_name(size, False, checkpointing)), {})
    values: Values = {}
    setup.forget_peak()
    if compiled:
        batch, started = eager.get("micro-batch") or 1, time.perf_counter()
        while batch and not step.fits(size, batch):
            batch //= 2
        values["first step, s"] = time.perf_counter() - started
    else:
        limit = 2 if setup.tiny or setup.device.type == "cpu" else LIMIT
        batch = largest(lambda n: step.fits(size, n), guess(setup, size, checkpointing), limit)
    if not batch:
        return {"micro-batch": 0, "result": "out of memory"}
    inputs = setup.inputs(setup.shape(size, batch))
    seconds = setup.timed(lambda: step(inputs), warm_up=1)
    work = flops.train_flops(setup.arguments(), setup.shape(size, batch), inputs[3].shape[1])
    return {
        "micro-batch": batch,
        "s/step": seconds,
        "samples/s": batch / seconds,
        **setup.utilisation(work, seconds),
        "peak GiB": setup.peak_gib(),
        "estimate GiB": estimate(setup, size, checkpointing, batch) / 2**30,
        **values,
    }


def build(setup: Setup, checkpointing: Checkpointing, compiled: bool) -> torch.nn.Module:
    """Make the model with activation checkpointing and compiled blocks, as `stdit train` does."""
    model = setup.model()
    if checkpointing != "none" or compiled:
        from stdit_train.distributed.parallelize import apply_ac, apply_compile

        apply_ac(model, SETTINGS[checkpointing])
        if compiled:
            torch._dynamo.reset()  # graphs of other sizes do not count against its limits
            apply_compile(model)
    return model


def estimate(setup: Setup, size: str, checkpointing: Checkpointing, batch: int) -> int:
    """Return the bytes of a step that `stdit plan` estimates, for what is here: no EMA, VAE and text encoder."""
    from stdit_train.config.load import load_stage
    from stdit_train.estimate.training import estimate_run

    config = load_stage("16x256")
    stride = 8  # of the VAE
    frames, height, width = setup.latents[size]
    arguments = setup.arguments()
    sizes = {key: arguments[key] for key in ("depth", "hidden_size", "num_heads")}
    config = replace(
        config,
        global_batch=batch,
        micro_batch=batch,
        activation_checkpointing=SETTINGS[checkpointing],
        model=replace(config.model, **sizes),
        data=replace(config.data, frames=frames, height=height * stride, width=width * stride),
    )
    found = estimate_run(config, 0)
    left_out = ("EMA", "VAE and text encoder")
    memory = {name: 0 if name in left_out else size for name, size in found.memory.items()}
    return replace(found, memory=memory).step_memory


def guess(setup: Setup, size: str, checkpointing: Checkpointing) -> int:
    """Return the largest micro-batch by the estimate."""
    if setup.device.type != "cuda":
        return 1
    free, batch = torch.cuda.mem_get_info()[0], 1
    try:
        while batch < LIMIT and estimate(setup, size, checkpointing, 2 * batch) < free:
            batch *= 2
    except ImportError:
        return 4
    return batch
