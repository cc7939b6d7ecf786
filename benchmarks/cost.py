"""Measure seconds and memory of a training step for clips of 4 to 256 frames, with full and with split attention.

One step is forward, backward and AdamW for one clip. Each variant and length is measured in a separate process (on a
GPU in this one), with the variants interleaved at each length. On a CPU, processor time is reported beside wall time,
which on a shared machine includes other work; the load average is recorded. FLOPs are computed by formula
(`stdit_model.flops`), which also gives the length at which full attention costs twice as much as seq, here and at XL/2.

    uv run python benchmarks/cost.py --out benchmarks/cost      # benchmarks/cost.md, .csv and .png
"""

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stdit_model import VARIANTS, STDiT, flops
from stdit_model.presets import preset
from stdit_train.config.schema import ObjectiveConfig
from stdit_train.loss.objective import training_loss
from stdit_train.report.plots import new_figure

TEXT_TOKENS, CAPTION_CHANNELS = 120, 64
QUIET = 1.0  # lowest load average that counts as a shared machine
SHARED = (
    "**The machine was shared**: wall time includes the work of others; processor time does not, except through shared "
    "caches."
)


@dataclass(frozen=True)
class Measured:
    """Cost of a training step of one variant at one length."""

    variant: str
    frames: int
    tokens: int
    gflops: float
    seconds: float  # wall time, median
    processor_seconds: float  # of all threads, median; on a GPU those of the host
    mib: float  # peak of the step above what was in use before the model was built


def model_arguments(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Return the constructor arguments of the small model that is measured."""
    return {
        "variant": variant,
        "depth": args.depth,
        "hidden_size": args.width,
        "num_heads": args.heads,
        "caption_channels": CAPTION_CHANNELS,
        "model_max_length": TEXT_TOKENS,
        "learn_sigma": False,
    }


def measure(args: argparse.Namespace, variant: str, frames: int) -> Measured:
    """Measure steps of one variant at one length, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    before = _memory(device, reset=True)
    torch.manual_seed(0)
    arguments = model_arguments(args, variant)
    model = STDiT(**arguments).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (1, 4, frames, args.size, args.size)
    x0, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    y = torch.randn(1, TEXT_TOKENS, CAPTION_CHANNELS, device=device)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device)
    level = torch.full((1,), 0.5, device=device)
    clock, processor = [], []
    for _ in range(args.repeats + 1):
        started, used = time.perf_counter(), time.process_time()
        loss = training_loss(model, ObjectiveConfig(name="flow"), x0, noise, level, y, mask)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return Measured(
        variant=variant,
        frames=frames,
        tokens=frames * (args.size // 2) ** 2,
        gflops=flops.train_flops(arguments, shape, TEXT_TOKENS) / 1e9,
        seconds=statistics.median(clock[1:]),
        processor_seconds=statistics.median(processor[1:]),
        mib=(_memory(device) - before) / 2**20,
    )


def _memory(device: torch.device, reset: bool = False) -> float:
    """Return the peak so far in bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def isolated(args: argparse.Namespace, variant: str, frames: int) -> Measured:
    """Run `measure` in a child process, so that its peak memory is its own; a GPU's counter can be reset instead."""
    if torch.cuda.is_available():
        return measure(args, variant, frames)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (args, variant, frames))


def all_measured(args: argparse.Namespace) -> Iterable[Measured]:
    """Measure every variant at every length, except those that would exceed --limit at the rate so far."""
    rate: dict[str, float] = {}  # seconds per GFLOP
    for frames in args.frames:
        found: dict[str, list[Measured]] = {}
        for variant in args.variants * args.rounds:  # interleaved, so that other load affects all of them alike
            shape = (1, 4, frames, args.size, args.size)
            gflops = flops.train_flops(model_arguments(args, variant), shape, TEXT_TOKENS) / 1e9
            expected = gflops * rate.get(variant, 0.0) * (args.repeats + 1)
            if expected > args.limit:
                print(f"{variant}, {frames} frames: left out, it would take about {expected:.0f} s", flush=True)
                continue
            found.setdefault(variant, []).append(isolated(args, variant, frames))
        for variant, rounds in found.items():
            middle = {
                field: statistics.median(getattr(one, field) for one in rounds)
                for field in ("seconds", "processor_seconds", "mib")
            }
            rate[variant] = middle["seconds"] / rounds[0].gflops
            print(f"{variant}, {frames} frames: {middle['seconds']:.3f} s", flush=True)
            yield replace(rounds[0], **middle)


def twice_as_dear(arguments: dict[str, Any], size: int, text: int) -> int:
    """Return the smallest number of frames at which a step of dit takes twice the FLOPs of one of seq, by formula."""

    def ratio(frames: int) -> float:
        cost = [
            flops.train_flops({**arguments, "variant": v}, (1, 4, frames, size, size), text) for v in ("dit", "seq")
        ]
        return cost[0] / cost[1]

    frames = 1
    while ratio(frames) < 2:
        frames += 1
    return frames


def crossing(found: list[Measured], field: str) -> str:
    """Return the two lengths between which the measured cost of dit exceeds twice that of seq."""
    cost = {(m.variant, m.frames): getattr(m, field) for m in found}
    lengths = [n for n in sorted({m.frames for m in found}) if ("dit", n) in cost and ("seq", n) in cost]
    above = [n for n in lengths if cost["dit", n] >= 2 * cost["seq", n]]
    if not above:
        return f"not up to {max(lengths)} frames" if lengths else "not measured"
    last = [n for n in lengths if n < above[0]]
    return f"between {last[-1]} and {above[0]} frames" if last else f"from {above[0]} frames on"


def report(found: list[Measured], args: argparse.Namespace, load: float, minutes: float) -> str:
    """Return the tables as Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    threads = args.threads or torch.get_num_threads()
    shared = "" if torch.cuda.is_available() else f", {threads} threads"
    lines = [
        "# The cost of longer clips",
        "",
        f"`uv run python benchmarks/cost.py {shlex.join(sys.argv[1:])}`",
        "",
        f"{device}{shared}, torch {torch.__version__}, {minutes:.1f} minutes, load average {load:.1f} at the start on "
        f"{os.cpu_count()} cores. {SHARED if load >= QUIET else ''}".rstrip(),
        "",
        f"A training step (forward, backward, AdamW) of one clip, latents {args.size}x{args.size}, width {args.width}, "
        f"{args.depth} blocks, {args.heads} heads, {TEXT_TOKENS} text tokens, float32; median of "
        f"{args.rounds} processes, each the median of {args.repeats} steps. "
        "A block of latte has one attention, a block of seq or parallel has two.",
        "",
        "| frames | tokens | variant | GFLOPs | processor seconds | seconds | memory, MiB | times seq (GFLOPs) | "
        "times seq (processor seconds) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    seq = {m.frames: m for m in found if m.variant == "seq"}
    for m in found:
        base = seq.get(m.frames)
        ratios = ["", ""]
        if base:
            seconds = m.processor_seconds / base.processor_seconds
            ratios = [f"{m.gflops / base.gflops:.2f}", f"{seconds:.2f}"]
        cells = [f"{m.frames}", f"{m.tokens:,}", m.variant, f"{m.gflops:.2f}", f"{m.processor_seconds:.3f}"]
        cells += [f"{m.seconds:.3f}", f"{m.mib:.0f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"![Seconds, memory and FLOPs over frames]({args.out.name}.png)",
        "",
        "Clip length at which full attention (dit) costs twice as much as seq:",
        "",
        "| model | measure | frames |",
        "|---|---|---|",
    ]
    small = f"width {args.width}, {args.size * 8} pixels"
    lines.append(f"| {small} | processor seconds, measured | {crossing(found, 'processor_seconds')} |")
    lines.append(f"| {small} | memory, measured | {crossing(found, 'mib')} |")
    arguments = model_arguments(args, "seq")
    lines.append(f"| {small} | FLOPs, formula | {twice_as_dear(arguments, args.size, TEXT_TOKENS)} |")
    for pixels in (256, 512):
        frames = twice_as_dear(preset("XL/2"), pixels // 8, TEXT_TOKENS)
        lines.append(f"| XL/2, {pixels} pixels | FLOPs, formula | {frames} |")
    return "\n".join(lines) + "\n"


def plot(found: list[Measured], output: Path) -> None:
    """Plot seconds, memory and FLOPs over frames, both axes logarithmic."""
    figure, axes = new_figure(13, 4, 3)
    panels = {"processor_seconds": "processor seconds a step", "mib": "memory, MiB", "gflops": "GFLOPs a step"}
    for panel, (field, label) in zip(axes, panels.items(), strict=True):
        for i, variant in enumerate(VARIANTS):
            points = [(m.frames, getattr(m, field)) for m in found if m.variant == variant]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{i}", label=variant)
        panel.set(yscale="log", xlabel="frames", title=label)
        panel.set_xscale("log", base=2)
        lengths = sorted({m.frames for m in found})
        panel.set_xticks(lengths, list(map(str, lengths)))
        panel.grid(alpha=0.25, which="both")
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main() -> None:
    """Measure, then write PREFIX.md, .csv and .png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 96, "depth": 4, "heads": 4, "size": 8, "repeats": 9, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="skip measurements that would take longer, in seconds"
    )
    parser.add_argument("--out", type=Path, default=Path("cost"), help="prefix of the output files")
    args = parser.parse_args()
    load, started = os.getloadavg()[0], time.perf_counter()
    found = list(all_measured(args))
    text = report(found, args, load, (time.perf_counter() - started) / 60)
    args.out.with_suffix(".md").write_text(text)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(found[0])))
        writer.writeheader()
        writer.writerows(asdict(m) for m in found)
    plot(found, args.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
