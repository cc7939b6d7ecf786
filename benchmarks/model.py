"""Measure FLOP/s of forward and backward: STDiT's variants beside diffusers' PixArt and Latte transformers.

Not seconds, because the blocks differ: ours have spatial and temporal attention in one block (seq, parallel), theirs
one of them, and Latte's temporal blocks no cross-attention. All models get the same width, heads, number of blocks,
tokens and text; PixArt takes the frames as images. FLOPs are counted by torch (attention as two matrix products).
The models take turns, one step each a round; the median of the rounds counts.

    uv run python benchmarks/model.py --help
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stdit_model import VARIANTS, STDiT

TEXT_TOKENS, CAPTION_CHANNELS = 120, 4096


def models(args: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """Constructors by name."""
    theirs = {
        "num_attention_heads": args.heads,
        "attention_head_dim": args.width // args.heads,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": args.width,
        "caption_channels": CAPTION_CHANNELS,
        "attention_bias": True,
        "patch_size": 2,
        "sample_size": args.size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    ours = {"hidden_size": args.width, "num_heads": args.heads, "depth": args.depth}
    made: dict[str, Callable[[], nn.Module]] = {
        f"STDiT {variant}": lambda variant=variant: STDiT(variant=variant, **ours) for variant in VARIANTS
    }
    made["PixArt (diffusers)"] = lambda: PixArtTransformer2DModel(
        **theirs, num_layers=args.depth, use_additional_conditions=False
    )
    # Each of its layers is two blocks.
    made["Latte (diffusers)"] = lambda: LatteTransformer3DModel(
        **theirs, num_layers=args.depth // 2, video_length=args.frames
    )
    return made


def step(model: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of a batch of clips."""
    batch, frames = args.batch, args.frames
    x = torch.randn(batch, 4, frames, args.size, args.size, device=device, dtype=dtype)
    t = torch.full((batch,), 500, device=device)
    y = torch.randn(batch, TEXT_TOKENS, CAPTION_CHANNELS, device=device, dtype=dtype)
    output: Tensor
    if isinstance(model, STDiT):
        output = model(x, t, y)
    elif isinstance(model, LatteTransformer3DModel):
        output = model(x, t, y).sample
    else:
        images = x.transpose(1, 2).flatten(0, 1)
        conditions = {"resolution": None, "aspect_ratio": None}
        output = model(images, y.repeat_interleave(frames, 0), t.repeat_interleave(frames), conditions).sample
    output.sum().backward()


def count(make: Callable[[], nn.Module], args: argparse.Namespace) -> tuple[int, int]:
    """Parameters, and FLOPs of one step, counted on tensors without contents."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = make()
        step(model, args, torch.device("cpu"), torch.float32)
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def main() -> None:
    """Time all models in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 1152), ("heads", 16), ("depth", 28), ("batch", 1), ("frames", 16), ("size", 32), ("rounds", 10),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)

    parameters, counts = {}, {}
    for name, make in models(args).items():
        parameters[name], counts[name] = count(make, args)
    # nn.Module's own `to`: that of diffusers warns of layers to keep in float32, of which there are none here.
    built = {name: nn.Module.to(make(), device, dtype) for name, make in models(args).items()}
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(args.rounds + 1):
        for name, model in built.items():
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(model, args, device, dtype)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)

    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    print(f"{hardware}; {args.dtype}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    tokens = args.batch * args.frames * (args.size // 2) ** 2
    print(f"{args.depth} blocks of width {args.width}, {args.heads} heads; {tokens} tokens, {TEXT_TOKENS} of text\n")
    print("| model | parameters | GFLOP a step | GFLOP/s (median) | slowest to fastest round |")
    print("|---|---:|---:|---:|---|")
    for name, times in seconds.items():
        rates = sorted(counts[name] / t / 1e9 for t in times[1:])  # the first round warms up
        print(
            f"| {name} | {parameters[name] / 1e6:.1f} M | {counts[name] / 1e9:.1f} | {statistics.median(rates):.1f} "
            f"| {rates[0]:.1f} to {rates[-1]:.1f} |"
        )


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
