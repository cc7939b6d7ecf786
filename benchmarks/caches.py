"""Measure what caches of diffusers cost and keep, beside fewer steps: the bundled demo on held-out prompts of `shapes`.

    uv run python benchmarks/caches.py --out benchmarks/caches

Writes PREFIX.csv, with a row for each batch of prompts under each cache and number of steps, then PREFIX.png, and
prints a table. Batches are the outer loop, so that other load affects all configurations alike; an interrupted run goes
on where it was. A cache that skipped nothing in its first batch is not measured further: its videos are those without.

What is computed of the network is counted in evaluations: the FLOPs of each part, times how often and for how many
rows it ran. Seconds are of the processor, for one video from prompt to latents, one thread; decoding is left out.
Distance is that of the latents from those of the same noise in 60 steps without a cache, relative to their norm.
"""

import argparse
import csv
import io
import time
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MagCacheConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stdit_data.datasets.shapes import Triple
from stdit_model import STDiTPipeline, video_vae
from stdit_model.sampling.caches import cache_config
from stdit_train.assets import demo_folder
from stdit_train.evaluation.confidence import mean_interval, wilson_interval
from stdit_train.evaluation.outline import measure_outline
from stdit_train.evaluation.prompt_following import evaluation_prompts
from stdit_train.evaluation.shape_reader import analyse
from stdit_train.pipeline.load import load_pipeline
from stdit_train.report.plots import new_figure

BATCH = 10
FEWER = (3, 2, 1)  # steps that are measured without a cache alone
PARTS = {"attn": "proj", "attn_temp": "proj", "cross_attn": "proj", "mlp": "fc1"}  # of a block, and a layer of each
EVERYWHERE = "*"  # ends the name of a cache that may skip at any timestep, not only at those of diffusers' defaults
CACHES = [
    *(f"first-block:{threshold}" for threshold in (0.2, 0.4, 0.8)),
    *(f"magcache:{threshold}" for threshold in (0.01, 0.06)),
    *(f"taylorseer:{interval}" for interval in (2, 3, 5)),
    *("pab:2", f"pab:2{EVERYWHERE}", f"pab:4{EVERYWHERE}"),
    *("fastercache:5", f"fastercache:5{EVERYWHERE}"),
]


@dataclass(frozen=True)
class Row:
    """A batch of prompts under one cache, or none (""), and number of steps; means are over its videos."""

    cache: str
    steps: int
    batch: int
    prompts: int
    right: int  # videos that show the colour, shape and motion of their prompts
    evaluations: float
    seconds: float
    distance: float
    overlaps: str  # intersection over union with the ideal shape, of each video


class Evaluations:
    """Count what is computed of a pipeline's transformer: 1 is all of it, for `videos` videos with guidance."""

    def __init__(self, pipeline: STDiTPipeline) -> None:
        self.count, self.videos = 0.0, 1
        model = pipeline.transformer
        names = [f"blocks.{i}.{part}" for i in range(len(model.blocks)) for part in PARTS]
        layers = [model.get_submodule(f"{name}.{PARTS[name.rpartition('.')[2]]}") for name in names]
        outside, sizes, call = model.x_embedder.proj, {}, {}
        watched = [model.register_forward_pre_hook(lambda _, a, k: call.update(args=a, kwargs=k), with_kwargs=True)]
        watched += [
            x.register_forward_hook(lambda x, a, _: sizes.update({x: a[0].numel()})) for x in (*layers, outside)
        ]
        pipeline("a red circle moving left", num_inference_steps=1, output_type="latent")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:  # the text's keys and values are there by now
            model(*call["args"], **call["kwargs"])
        for handle in watched:
            handle.remove()
        flops = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
        shares = [flops[f"STDiT.{name}"] / flops["Global"] for name in names]
        for layer, share in zip((*layers, outside), (*shares, 1.0 - sum(shares)), strict=True):
            layer.register_forward_hook(self._adder(share / sizes[layer]))

    def _adder(self, share: float) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.count += share * inputs[0].numel() / self.videos

        return add


class Bench:
    """The pipeline, with what it takes to sample a batch of prompts under a cache."""

    def __init__(self, calibrated: set[int]) -> None:
        """Load the demo, and calibrate MagCache for some numbers of steps."""
        self.pipeline = load_pipeline(str(demo_folder()))
        self.pipeline.set_progress_bar_config(disable=True)
        self.ratios = {steps: self._magnitude_ratios(steps) for steps in calibrated}
        self.evaluations = Evaluations(self.pipeline)

    def sample(self, cache: str, steps: int, wanted: list[tuple[Triple, str, int]]) -> tuple[Tensor, float]:
        """Return the latents [B, C, T, H, W], and seconds of the processor."""
        transformer = self.pipeline.transformer
        if cache:
            transformer.enable_cache(self.config(cache, steps))
        self.evaluations.count, self.evaluations.videos = 0.0, len(wanted)
        generators = [torch.Generator().manual_seed(seed) for _, _, seed in wanted]
        prompts = [prompt for _, prompt, _ in wanted]
        started = time.process_time()
        output = self.pipeline(prompts, generator=generators, num_inference_steps=steps, output_type="latent")
        spent = time.process_time() - started
        if cache:
            transformer.disable_cache()
        return output.frames, spent

    def row(
        self,
        cache: str,
        steps: int,
        batch: int,
        wanted: list[tuple[Triple, str, int]],
        latents: Tensor,
        seconds: float,
        reference: Tensor,
    ) -> Row:
        """Decode and score what was sampled last."""
        videos = list(
            zip([triple for triple, _, _ in wanted], video_vae.decode(self.pipeline.vae, latents), strict=True)
        )
        apart = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        return Row(
            cache=cache,
            steps=steps,
            batch=batch,
            prompts=len(videos),
            right=sum(analyse(video).matches(triple)["all"] for triple, video in videos),
            evaluations=round(self.evaluations.count, 4),
            seconds=round(seconds / len(videos), 5),
            distance=round(apart.mean().item(), 5),
            overlaps=" ".join(f"{measure_outline(video, triple.shape).overlap.mean():.4f}" for triple, video in videos),
        )

    def config(self, cache: str, steps: int) -> Any:
        name, value = cache.removesuffix(EVERYWHERE).split(":")
        if name == "magcache":
            ratios = self.ratios[steps]
            return MagCacheConfig(threshold=float(value), mag_ratios=ratios, num_inference_steps=steps)
        config = cache_config(f"{name}:{value}", lambda: self.pipeline.current_timestep)
        if cache.endswith(EVERYWHERE):
            for field in fields(config):
                if field.name.endswith("skip_range") and "timestep" in field.name:
                    setattr(config, field.name, (-1, 1001))
        return config

    def _magnitude_ratios(self, steps: int) -> list[float]:
        """Return MagCache's ratios for a number of steps, from prompts that the demo was trained on."""
        prompts = [prompt for _, prompt, _ in evaluation_prompts("train", BATCH)]
        transformer, printed = self.pipeline.transformer, io.StringIO()
        transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
        with redirect_stdout(printed):
            self.pipeline(prompts, num_inference_steps=steps, output_type="latent")
        transformer.disable_cache()
        return [float(ratio) for ratio in printed.getvalue().split("[")[-1].split("]")[0].split(",")]


def measure(configurations: list[tuple[str, int]], asked: argparse.Namespace) -> list[Row]:
    """Append a row for each batch and configuration that the file does not have yet; return all."""
    file = asked.out.with_suffix(".csv")
    rows = read(file)
    bench = Bench({steps for cache, steps in configurations if cache.startswith("magcache")})
    wanted = evaluation_prompts("heldout", asked.prompts)
    with file.open("a", newline="") as output:
        writer = csv.DictWriter(output, [field.name for field in fields(Row)])
        if not rows:
            writer.writeheader()
        for batch, start in list(enumerate(range(0, asked.prompts, BATCH)))[: asked.batches]:
            done = {(row.cache, row.steps) for row in rows if row.batch == batch or idle(row)}
            missing = [one for one in configurations if one not in done]
            part = wanted[start : start + BATCH]
            reference = bench.sample("", asked.reference, part)[0] if missing else None
            for cache, steps in missing:
                latents, seconds = bench.sample(cache, steps, part)
                rows.append(bench.row(cache, steps, batch, part, latents, seconds, reference))
                writer.writerow(asdict(rows[-1]))
                output.flush()
            print(f"{start + len(part)} prompts", flush=True)
    return rows


def read(file: Path) -> list[Row]:
    """Read the rows of a run before."""
    if not file.exists():
        return []
    kinds = {field.name: field.type for field in fields(Row)}
    with file.open(newline="") as lines:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(lines)]


def idle(row: Row) -> bool:
    """Whether a cache skipped nothing."""
    return bool(row.cache) and row.evaluations > row.steps - 0.01


@dataclass(frozen=True)
class Point:
    """All rows of a configuration."""

    cache: str
    steps: int
    prompts: int
    right: int
    evaluations: float
    seconds: float
    distance: float
    overlap: Any  # an interval


def summarise(rows: list[Row]) -> list[Point]:
    """Join the batches of each configuration, cheapest first; without those that skipped nothing."""
    batches: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if not idle(row):
            batches[row.cache, row.steps].append(row)
    points = []
    for (cache, steps), group in batches.items():
        prompts = sum(row.prompts for row in group)
        means = {
            name: sum(getattr(row, name) * row.prompts for row in group) / prompts
            for name in ("evaluations", "seconds", "distance")
        }
        overlap = mean_interval([float(value) for row in group for value in row.overlaps.split()])
        points.append(Point(cache, steps, prompts, sum(row.right for row in group), **means, overlap=overlap))
    return sorted(points, key=lambda point: point.evaluations)


def beside_fewer_steps(point: Point, plain: list[Point], cost: str) -> float:
    """Return its distance as a ratio to that of fewer steps at the same cost, between those that were measured."""
    plain = [one for one in plain if one.distance]  # without the steps that are the reference
    costs, distances = ([np.log(getattr(one, name)) for one in plain] for name in (cost, "distance"))
    return point.distance / float(np.exp(np.interp(np.log(getattr(point, cost)), costs, distances)))


def print_tables(points: list[Point]) -> None:
    """Print all points, seconds in units of a step without a cache; and how each cache stands beside fewer steps."""
    plain = [point for point in points if not point.cache]
    unit = plain[-1].seconds / plain[-1].steps
    print(
        "| cache | steps | evaluations | seconds | all correct | shape IoU | distance |\n|---|---|---|---|---|---|---|"
    )
    for point in points:
        low, high = wilson_interval(point.right, point.prompts)
        right = f"{point.right} of {point.prompts} ({low:.2f} to {high:.2f})"
        cells = [point.cache or "none", str(point.steps), f"{point.evaluations:.2f}", f"{point.seconds / unit:.2f}"]
        print(f"| {' | '.join([*cells, right, point.overlap.text(3), f'{point.distance:.3f}'])} |")
    print(f"\nA step without a cache takes {unit:.4f} s of the processor for a video, by {plain[-1].steps} steps.\n")
    print("| cache | distance, at equal evaluations | at equal seconds |\n|---|---|---|")
    for cache in dict.fromkeys(point.cache for point in points if point.cache):
        cells = []
        for cost in ("evaluations", "seconds"):
            ratios = [beside_fewer_steps(point, plain, cost) for point in points if point.cache == cache]
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        print(f"| {cache} | {' | '.join(cells)} |")


def plot(points: list[Point], file: Path) -> None:
    """Plot what is kept over evaluations and over seconds."""
    figure, axes = new_figure(13, 8, 3, (1.0, 1.0))
    plain = [point for point in points if not point.cache]
    unit = plain[-1].seconds / plain[-1].steps
    names = sorted({kind(point.cache) for point in points if point.cache})
    panels = {
        "all correct, share": lambda p: p.right / p.prompts,
        "shape IoU": lambda p: p.overlap.mean,
        "distance": lambda p: p.distance,
    }
    costs = {
        "evaluations of the network": lambda p: p.evaluations,
        "seconds, in units of a step without a cache": lambda p: p.seconds / unit,
    }
    for row, (cost, of) in zip(axes, costs.items(), strict=True):
        for panel, (title, value) in zip(row, panels.items(), strict=True):
            for i, name in enumerate(names):
                group = [point for point in points if point.cache and kind(point.cache) == name]
                panel.scatter([of(p) for p in group], [value(p) for p in group], s=16, color=f"C{i}", label=name)
            panel.plot([of(p) for p in plain], [value(p) for p in plain], "k.-", lw=1, label="no cache, fewer steps")
            for p in plain:
                panel.annotate(str(p.steps), (of(p), value(p)), textcoords="offset points", xytext=(3, -9), fontsize=7)
            panel.set(xlabel=cost, ylabel=title, xscale="log")
            panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            panel.grid(alpha=0.25)
        row[2].set_yscale("log")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def kind(cache: str) -> str:
    """Return the name of a cache without its value."""
    return cache.split(":")[0] + (", any timestep" if cache.endswith(EVERYWHERE) else "")


def main() -> None:
    """Measure what is missing; write PREFIX.png and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--reference", type=int, default=60, help="steps that distance is measured from")
    parser.add_argument("--batches", type=int, help="stop after so many batches of the prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 12, 8, 6, 4])
    parser.add_argument("--caches", nargs="*", default=CACHES)
    parser.add_argument("--out", type=Path, default=Path("caches"), help="prefix of the output files")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    configurations = [("", steps) for steps in (*asked.steps, *FEWER)]
    configurations += [(cache, steps) for steps in asked.steps for cache in asked.caches]
    points = summarise(measure(configurations, asked))
    print_tables(points)
    plot(points, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
