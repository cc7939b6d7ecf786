"""Full attention (dit) beside spatial and temporal attention (seq), as clips get longer."""

from functools import partial

from benchmarks.gpu.setup import Case, Setup, TrainStep, Values

from stdit_model import flops

TITLE = "dit beside seq by frames: a training step of one clip, 256 x 256, bf16"
FRAMES = (16, 32, 64, 128)


def cases(setup: Setup) -> list[Case]:
    lengths = (1, 2) if setup.tiny else FRAMES
    return [Case(f"{frames} frames", partial(measure, setup, frames), rank=1) for frames in lengths]


def measure(setup: Setup, frames: int) -> Values:
    _, height, width = setup.latents["16x256"]
    shape = (1, 4, frames, height, width)
    values: Values = {}
    seconds, work = {}, {}
    for variant in ("seq", "dit"):
        step, inputs = TrainStep(setup, setup.model(variant)), setup.inputs(shape)
        setup.forget_peak()
        seconds[variant] = setup.timed(lambda step=step, inputs=inputs: step(inputs))
        work[variant] = flops.train_flops(setup.arguments(variant), shape, inputs[3].shape[1])
        mfu = setup.utilisation(work[variant], seconds[variant])["MFU"]
        values |= {f"{variant}, s": seconds[variant], f"{variant}, MFU": mfu, f"{variant}, GiB": setup.peak_gib()}
        del step
    return {
        "dit / seq": seconds["dit"] / seconds["seq"],
        "dit / seq, FLOPs": work["dit"] / work["seq"],
        **values,
    }
