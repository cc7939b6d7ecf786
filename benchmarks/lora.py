"""Teach the demo what it has never seen with a LoRA adapter, a colour or a motion; measure what is learned and kept.

    uv run python benchmarks/lora.py clips chameleon
    uv run stdit train --lora 16 --init demo --data chameleon --out runs/chameleon --steps 300 --set data.interval=1 \
        --set optimizer.name=adamw --set optimizer.lr=2e-3 --set optimizer.warmup=20
    uv run python benchmarks/lora.py score --lora runs/chameleon --sheet chameleon.png

`clips` paints a folder of mp4 files with captions. In half of them is what is new, under a word that the demo's text
encoder does not know: with `--lesson chameleon` an eighth colour, red that turns blue in the middle of the clip; with
`--lesson circling` a motion, once around. The others are clips of `shapes`, so that the adapter does not forget them.
`score` samples prompts with and without the adapter and reads the videos by image analysis. Other colours and shapes
cannot be taught: the demo's VAE decodes each of 18 colours that were tried as one of its seven, or as a mottle of them
(orange as red, pink as purple, grey as brown), a square as a circle, and a diamond as a cross.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stdit_data.datasets.shapes import (
    BACKGROUND,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    ShapesDataset,
    Triple,
    render,
    triples,
)
from stdit_data.preview import contact_sheet
from stdit_data.video.write import write_mp4
from stdit_model.weights.adapters import load_adapters
from stdit_train.evaluation.confidence import wilson_interval
from stdit_train.evaluation.shape_reader import FOREGROUND_DISTANCE, analyse, circular_center
from stdit_train.pipeline.load import load_pipeline

FRAMES, SIDE, FPS = 16, 64, 8.0
RADIUS = 0.12  # of the path, of the frame's side
CHAMELEON = ("red", "blue")  # in the halves of a clip
CIRCLING = (
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
    clips.add_argument("--count", type=int, default=256, help="clips, half of them with what is new")
    score = commands.add_parser("score")
    score.add_argument("--lora", required=True)
    score.add_argument("--prompts", type=int, default=56, help="of each kind")
    score.add_argument("--sheet", type=Path, help="PNG to write with a few of the videos")
    for command in (clips, score):
        command.add_argument("--lesson", choices=("chameleon", "circling"), default="chameleon")
    asked = parser.parse_args()
    if asked.command == "clips":
        paint_clips(asked.folder, asked.lesson, asked.count)
    else:
        measure(asked.lora, asked.lesson, asked.prompts, asked.sheet)


def items(lesson: str, *, unseen: bool) -> list[Triple]:
    """Return what is taught in all combinations, or those that are not in training: one for each shape."""
    if lesson == "circling":
        every = [Triple(colour, shape, lesson) for shape in SHAPES for colour in COLOURS]
    else:
        every = [Triple(lesson, shape, motion) for shape in SHAPES for motion in MOTIONS]
    size = len(every) // len(SHAPES)
    return [triple for i, triple in enumerate(every) if (i % size == 2 * (i // size) % size) == unseen]


def wordings(triple: Triple) -> list[str]:
    if triple.motion != "circling":
        return triple.captions()
    return [wording.format(triple.colour, triple.shape) for wording in CIRCLING]


def paint(scene: Scene) -> Tensor:
    """Draw a clip of a lesson: [3, T, H, W]."""
    new = scene.triple
    if new.motion != "circling":
        colours = (replace(scene, triple=replace(new, colour=colour)) for colour in CHAMELEON)
        first, second = (render(scene, FRAMES, SIDE, SIDE) for scene in colours)
        return torch.cat([first[:, : FRAMES // 2], second[:, FRAMES // 2 :]], dim=1)
    still, frames = replace(scene, triple=replace(new, motion="still")), []
    for angle in 2 * np.pi * np.arange(FRAMES) / FRAMES:  # clockwise from the top
        x, y = scene.x + RADIUS * np.sin(angle), scene.y - RADIUS * np.cos(angle)
        frames.append(render(replace(still, x=x, y=y), 1, SIDE, SIDE))
    return torch.cat(frames, dim=1)


def paint_clips(folder: Path, lesson: str, count: int) -> None:
    """Write clips, each with its caption."""
    folder.mkdir(parents=True)
    rng, known, new = np.random.default_rng(0), ShapesDataset(seed=1, spread=0.1), items(lesson, unseen=False)
    for number in range(count):
        clip = known.load(number)
        video, caption = clip.video, clip.caption
        if number % 2 == 0:
            triple = new[int(rng.integers(len(new)))]
            video = paint(replace(known.scene(number), triple=triple))
            caption = str(rng.choice(wordings(triple)))
        write_mp4(folder / f"{number:03d}.mp4", video, FPS)
        (folder / f"{number:03d}.txt").write_text(caption + "\n")
    print(f"{count} clips in {folder}")


def shows(video: Tensor, triple: Triple) -> bool:
    """Return whether a video shows what a prompt of a lesson, or of `shapes`, asks for."""
    whole = analyse(video)
    if triple.motion == "circling":
        return whole.matches(triple)["colour"] and whole.matches(triple)["shape"] and circles(video)
    if triple.colour != "chameleon":
        return whole.matches(triple)["all"]
    halves = zip(CHAMELEON, video.split(FRAMES // 2, dim=1), strict=True)
    parts = [analyse(half).matches(replace(triple, colour=colour)) for colour, half in halves]
    return whole.motion == triple.motion and all(part["colour"] and part["shape"] for part in parts)


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


def measure(lora: str, lesson: str, count: int, sheet: Path | None) -> None:
    """Print the share of videos that show their prompts: what was taught, in seen and unseen pairs, and the rest."""
    rng = np.random.default_rng(1)
    kinds = {
        f"{lesson}, seen pairs": items(lesson, unseen=False),
        f"{lesson}, unseen pairs": items(lesson, unseen=True),
        "known prompts": triples("train"),
    }
    plain, adapted = load_pipeline("demo"), load_pipeline("demo")
    load_adapters(adapted.transformer, [(lora, 1.0)])
    shown, captions = [], []
    for kind, pool in kinds.items():
        order = [i for _ in range(-(-count // len(pool))) for i in rng.permutation(len(pool))][:count]
        for name, pipeline in (("demo", plain), ("with the adapter", adapted)):
            right = 0
            for start in range(0, count, 8):
                part = [(wordings(pool[i])[0], pool[i]) for i in order[start : start + 8]]
                generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
                videos = pipeline([prompt for prompt, _ in part], generator=generators).frames
                right += sum(shows(video, triple) for (_, triple), video in zip(part, videos, strict=True))
                if start == 0:
                    shown += list(videos[:3])
                    captions += [f"{prompt} ({name})" for prompt, _ in part[:3]]
            low, high = wilson_interval(right, count)
            print(f"{kind:24} {name:18} {right} of {count} ({low:.0%} to {high:.0%})", flush=True)
    if sheet is not None:
        contact_sheet(shown, captions).save(sheet)


if __name__ == "__main__":
    main()
