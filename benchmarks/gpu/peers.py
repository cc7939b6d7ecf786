"""The same training step beside diffusers' PixArt and Latte of equal width and depth."""

from argparse import Namespace
from functools import partial

import torch
from benchmarks.gpu.setup import Case, Setup, Values, fill
from torch import nn

from benchmarks import model as peers

TITLE = "Beside diffusers' PixArt and Latte: forward, backward and AdamW in bf16, 16x256"
OURS = ("STDiT seq", "STDiT latte")
BATCH = 4


def cases(setup: Setup) -> list[Case]:
    arguments, (frames, size, _) = setup.arguments(), setup.latents["16x256"]
    args = Namespace(
        width=arguments["hidden_size"], heads=arguments["num_heads"], depth=arguments["depth"],
        batch=1 if setup.tiny else BATCH, frames=frames, size=size, open_sora=None,
    )  # fmt: skip
    names = [name for name in peers.models(args) if not name.startswith("STDiT") or name in OURS]
    return [Case(name, partial(measure, setup, name, args)) for name in names]


def measure(setup: Setup, name: str, args: Namespace) -> Values:
    make = peers.models(args)[name]
    parameters, work = peers.count(make, args)
    torch.manual_seed(0)
    with setup.device:
        model: nn.Module = make()
    fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with setup.autocast():
            peers.step(model, args, setup.device, torch.float32)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    setup.forget_peak()
    seconds = setup.timed(step)
    return {
        "parameters, M": parameters / 1e6,
        "TFLOP per sample": work / args.batch / 1e12,
        "s/step": seconds,
        "samples/s": args.batch / seconds,
        **setup.utilisation(work, seconds),
        "peak GiB": setup.peak_gib(),
    }
