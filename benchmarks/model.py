"""Measure FLOP/s of forward, and of forward and backward: STDiT's variants beside diffusers' PixArt and Latte.

Not seconds, because the blocks differ: ours have spatial and temporal attention in one block (seq, parallel), theirs
one of them, and Latte's temporal blocks no cross-attention. All models get the same width, heads, number of blocks,
tokens and text; PixArt takes the frames as images. FLOPs are counted by torch (attention as two matrix products).
The share is that of the rate at which the matrix products of seq alone run, of its shapes and as often. The models take
turns, once each a round; the median of the rounds counts. On a CPU processor time is measured, not wall time, and the
process keeps the memory that it frees, as `stdit train` does (`stdit_train.hardware`). With `--open-sora`, a clone of
hpcaitech/Open-Sora with its tags, its STDiT of v1.0.0 takes part.

    uv run python benchmarks/model.py --help
"""

import argparse
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stdit_model import VARIANTS, STDiT
from stdit_train.hardware import keep_freed_memory

TEXT_TOKENS, CAPTION_CHANNELS = 120, 4096
PLAIN = "the matrix products of STDiT seq alone"
OPEN_SORA = "STDiT of Open-Sora v1.0"


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
    if args.open_sora is not None:
        import open_sora  # beside this script

        made[OPEN_SORA] = partial(
            open_sora.build, open_sora.load(args.open_sora), args.width, args.heads, args.depth, args.frames, args.size
        )
    return made


def forward(model: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Forward of a batch of clips."""
    batch, frames = args.batch, args.frames
    x = torch.randn(batch, 4, frames, args.size, args.size, device=device, dtype=dtype)
    t = torch.full((batch,), 500, device=device)
    y = torch.randn(batch, TEXT_TOKENS, CAPTION_CHANNELS, device=device, dtype=dtype)
    if isinstance(model, STDiT):
        return model(x, t, y)
    if type(model).__module__.startswith("opensora."):
        return model(x, t, y[:, None])
    if isinstance(model, LatteTransformer3DModel):
        return model(x, t, y).sample
    images = x.transpose(1, 2).flatten(0, 1)
    conditions = {"resolution": None, "aspect_ratio": None}
    return model(images, y.repeat_interleave(frames, 0), t.repeat_interleave(frames), conditions).sample


def step(model: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of a batch of clips."""
    forward(model, args, device, dtype).sum().backward()


@torch.no_grad()
def sample(model: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Forward alone, as in sampling."""
    forward(model, args, device, dtype)


class Products(TorchDispatchMode):
    """Records the shapes of matrix products, with how often each occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[torch.Size, torch.Size]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.shapes[args[-2].shape, args[-1].shape] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        return sum(2 * a.numel() * b[-1] * often for (a, b), often in self.shapes.items())

    def replay(self, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
        """Return a function that computes these products, on contiguous matrices."""
        pairs = {pair: tuple(torch.randn(shape, device=device, dtype=dtype) for shape in pair) for pair in self.shapes}

        def run() -> None:
            for pair, often in self.shapes.items():
                for _ in range(often):
                    torch.matmul(*pairs[pair])

        return run


def products(make: Callable[[], nn.Module], args: argparse.Namespace, run: Callable[..., None]) -> Products:
    """Return the matrix products of a forward, or of a forward and backward; attention has two, and two copies."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), Products() as found:
        run(make(), args, torch.device("cpu"), torch.float32)
    return found


def count(make: Callable[[], nn.Module], args: argparse.Namespace, run: Callable[..., None] = step) -> tuple[int, int]:
    """Parameters, and FLOPs of a forward and backward, or of `run`, counted on tensors without contents.

    Open-Sora's constructor reads values of tensors, so that its own have contents.
    """
    fake = nullcontext() if isinstance(make, partial) else FakeTensorMode()
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = make()
        run(model, args, torch.device("cpu"), torch.float32)
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def main() -> None:
    """Time all models in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 1152), ("heads", 16), ("depth", 28), ("batch", 1), ("frames", 16), ("size", 32), ("rounds", 10),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--models", nargs="+", help="names of models, or parts of them [all]")
    default_dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", nargs="+", default=[default_dtype], help="of weights and activations; plain: first")
    parser.add_argument("--open-sora", type=Path, metavar="CLONE", help="a clone of hpcaitech/Open-Sora, with its tags")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    dtypes = {name: getattr(torch, name) for name in args.dtype}
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    makers = {
        name: make
        for name, make in models(args).items()
        if not args.models or any(part in name for part in args.models)
    }
    # nn.Module's own `to`: that of diffusers warns of layers to keep in float32, of which there are none here.
    built = {
        (name, kind): nn.Module.to(make(), device, dtype)
        for name, make in makers.items()
        for kind, dtype in dtypes.items()
    }
    for (name, kind), model in built.items():
        if name == OPEN_SORA:
            model.dtype = dtypes[kind]  # it casts its inputs to this
    tokens = args.batch * args.frames * (args.size // 2) ** 2
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    print(f"{hardware}; {', '.join(args.dtype)}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{args.depth} blocks of width {args.width}, {args.heads} heads; {tokens} tokens, {TEXT_TOKENS} of text")
    for title, run in (("forward", sample), ("forward and backward", step)):
        counts = {name: count(make, args, run) for name, make in makers.items()}
        plain = products(models(args)["STDiT seq"], args, run)
        counts[PLAIN] = 0, plain.flops
        first = args.dtype[0]
        ways: dict[tuple[str, str], Callable[[], None]] = {
            (name, kind): partial(run, model, args, device, dtypes[kind]) for (name, kind), model in built.items()
        }
        ways[PLAIN, first] = plain.replay(device, dtypes[first])
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
        for number in range(args.rounds + 1):
            for key, way in ways.items():
                if key in built:
                    built[key].zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = clock()
                way()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    rates[key].append(counts[key[0]][1] / (clock() - start) / 1e9)
        full = statistics.median(rates[PLAIN, first])
        print(f"\n| {title} | parameters | GFLOP | GFLOP/s (median) | slowest to fastest round | share |")
        print("|---|---:|---:|---:|---|---:|")
        for (name, kind), found in rates.items():
            size = f"{counts[name][0] / 1e6:.1f} M" if counts[name][0] else ""
            middle = statistics.median(found)
            label = name if len(dtypes) == 1 else f"{name}, {kind}"
            cells = [label, size, f"{counts[name][1] / 1e9:.1f}", f"{middle:.1f}"]
            print(f"| {' | '.join([*cells, f'{min(found):.1f} to {max(found):.1f}', f'{middle / full:.2f}'])} |")


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
