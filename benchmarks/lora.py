"""Teach the demo a motion that it has never seen, going around in a circle, with a LoRA adapter; measure what is kept.

    uv run python benchmarks/lora.py clips circling
    uv run stdit train --lora 16 --init demo --data circling --out runs/circling --steps 300 --set data.interval=1 \
        --set optimizer.name=adamw --set optimizer.lr=2e-3 --set optimizer.warmup=20
    uv run python benchmarks/lora.py score --lora runs/circling --sheet circling.png

`clips` paints a folder of mp4 files with captions: in half of them a shape is "circling", a word that the demo's text
encoder does not know; the others have the motions of `shapes`, so that the adapter does not forget them. `score`
samples prompts with and without the adapter and reads the videos by image analysis. New shapes or colours cannot be
taught so: the demo's VAE decodes a square as a circle, a diamond as a cross, and pink as purple.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stdit_data.datasets.shapes import BACKGROUND, COLOURS, SHAPES, Scene, ShapesDataset, Triple, render, triples
from stdit_data.preview import contact_sheet
from stdit_data.video.write import write_mp4
from stdit_model.weights.adapters import load_adapters
from stdit_train.evaluation.confidence import wilson_interval
from stdit_train.evaluation.shape_reader import FOREGROUND_DISTANCE, analyse, circular_center
from stdit_train.pipeline.load import load_pipeline

FRAMES, SIDE, FPS = 16, 64, 8.0
RADIUS = 0.12  # of the path, of the frame's side
WORDINGS = (
    "a {} {} circling",
    "the {} {} is circling",
    "{} {} circling",
    "a video of a {} {} circling",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips")
    clips.add_argument("folder", type=Path)
    clips.add_argument("--count", type=int, default=256, help="clips, half of them circling")
    score = commands.add_parser("score")
    score.add_argument("--lora", required=True)
    score.add_argument("--prompts", type=int, default=56, help="of each kind")
    score.add_argument("--sheet", type=Path, help="PNG to write with a few of the videos")
    asked = parser.parse_args()
    if asked.command == "clips":
        paint_clips(asked.folder, asked.count)
    else:
        measure(asked.lora, asked.prompts, asked.sheet)


def is_unseen(colour: int, shape: int) -> bool:
    """Whether a pair of colour and shape does not circle in training: one colour of each shape."""
    return colour == 2 * shape % len(COLOURS)


def pairs(*, unseen: bool) -> list[tuple[str, str]]:
    every = ((i, c, j, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES))
    return [(c, s) for i, c, j, s in every if is_unseen(i, j) == unseen]


def circling(colour: str, shape: str, x: float, y: float, radius: float) -> Tensor:
    """Draw a shape that goes once around, clockwise from the top: [3, T, H, W]."""
    frames = []
    for angle in 2 * np.pi * np.arange(FRAMES) / FRAMES:
        x_t, y_t = x + RADIUS * np.sin(angle), y - RADIUS * np.cos(angle)
        frames.append(render(Scene(Triple(colour, shape, "still"), "", x_t, y_t, radius, 0.0), 1, SIDE, SIDE))
    return torch.cat(frames, dim=1)


def paint_clips(folder: Path, count: int) -> None:
    """Write clips, each with its caption."""
    folder.mkdir(parents=True)
    rng, known, new = np.random.default_rng(0), ShapesDataset(seed=1), pairs(unseen=False)
    for number in range(count):
        if number % 2:
            clip = known.load(number)
            video, caption = clip.video, clip.caption
        else:
            colour, shape = new[int(rng.integers(len(new)))]
            x, y = 0.5 + rng.uniform(-0.1, 0.1, size=2)
            video = circling(colour, shape, float(x), float(y), rng.uniform(0.17, 0.21))
            caption = str(rng.choice(WORDINGS)).format(colour, shape)
        write_mp4(folder / f"{number:03d}.mp4", video, FPS)
        (folder / f"{number:03d}.txt").write_text(caption + "\n")
    print(f"{count} clips in {folder}")


def circles(video: Tensor) -> bool:
    """Return whether the foreground goes around once, clockwise, on a path of about the right size."""
    pixels = (video.float().permute(1, 2, 3, 0).numpy() + 1.0) * 127.5
    masks = np.linalg.norm(pixels - np.asarray(BACKGROUND), axis=-1) > FOREGROUND_DISTANCE
    if not masks.any((1, 2)).all():
        return False
    path = np.stack([circular_center(mask) for mask in masks]) / SIDE
    away = path - path.mean(0)
    turned = np.unwrap(np.arctan2(away[:, 1], away[:, 0]))
    whole = 2 * np.pi * (FRAMES - 1) / FRAMES
    return bool(0.7 < (turned[-1] - turned[0]) / whole < 1.3 and 0.5 < np.hypot(*away.T).mean() / RADIUS < 1.5)


def measure(lora: str, count: int, sheet: Path | None) -> None:
    """Print the share of videos that show their prompts: circling in seen and unseen pairs, and the known motions."""
    rng = np.random.default_rng(1)
    kinds: dict[str, list[tuple[str, Triple]]] = {
        "circling, seen pairs": [(WORDINGS[0].format(*p), Triple(*p, "")) for p in pairs(unseen=False)],
        "circling, unseen pairs": [(WORDINGS[0].format(*p), Triple(*p, "")) for p in pairs(unseen=True)],
        "known motions": [(triple.captions()[0], triple) for triple in triples("train")],
    }
    plain, adapted = load_pipeline("demo"), load_pipeline("demo")
    load_adapters(adapted.transformer, [(lora, 1.0)])
    shown, captions = [], []
    for kind, pool in kinds.items():
        order = [i for _ in range(-(-count // len(pool))) for i in rng.permutation(len(pool))][:count]
        for name, pipeline in (("demo", plain), ("with the adapter", adapted)):
            right = 0
            for start in range(0, count, 8):
                part = [pool[i] for i in order[start : start + 8]]
                generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
                videos = pipeline([prompt for prompt, _ in part], generator=generators).frames
                for (_, triple), video in zip(part, videos, strict=True):
                    found = analyse(video).matches(triple)
                    right += found["all"] if triple.motion else found["colour"] and found["shape"] and circles(video)
                if start == 0:
                    shown += list(videos[:3])
                    captions += [f"{prompt} ({name})" for prompt, _ in part[:3]]
            low, high = wilson_interval(right, count)
            print(f"{kind:24} {name:18} {right} of {count} ({low:.0%} to {high:.0%})", flush=True)
    if sheet is not None:
        contact_sheet(shown, captions).save(sheet)


if __name__ == "__main__":
    main()
