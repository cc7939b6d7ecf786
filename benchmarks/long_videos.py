"""Measure whether long videos of `shapes`, sampled in windows, keep shape, colour and speed.

    uv run python benchmarks/long_videos.py [CHECKPOINT] [--frames 256] [--prompts 20]

The bundled demo model is measured unless a checkpoint is given. Prints a line per video and a summary.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from continuation import steps_of

from stdit_data.datasets.shapes import triples
from stdit_data.preview import contact_sheet
from stdit_train.assets import demo_folder
from stdit_train.evaluation.shape_reader import STEADY, analyse
from stdit_train.pipeline.load import load_pipeline


def main() -> None:
    """Sample prompts of held-out and seen triples in turn; read each video as a whole, and its last window alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=str(demo_folder()))
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--overlap", type=int)
    parser.add_argument("--resampling-steps", type=int)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--sheet", type=Path, help="PNG to write with eight frames of each video")
    asked = parser.parse_args()
    pipeline = load_pipeline(asked.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    window = pipeline.config.num_frames
    overlap = asked.overlap or window // 2
    held_out, seen = triples("heldout"), triples("train")
    picked = [(held_out if i % 2 else seen)[(i // 2 * 37) % (28 if i % 2 else 224)] for i in range(asked.prompts)]
    videos = pipeline(
        [triple.captions()[0] for triple in picked],
        num_frames=asked.frames,
        window=window,
        overlap=overlap,
        resampling_steps=asked.resampling_steps,
        guide_continuation=asked.guided,
        generator=[torch.Generator().manual_seed(i) for i in range(asked.prompts)],
    ).frames
    whole, last, steady, kept, seams, others = 0, 0, 0, [], [], []
    for triple, video in zip(picked, videos, strict=True):
        right, ended = analyse(video).matches(triple)["all"], analyse(video[:, -window:]).matches(triple)["all"]
        steps = steps_of(video)
        off = np.linalg.norm(steps - np.median(steps, axis=0), axis=1)
        at_seam = np.zeros(len(steps), bool)
        at_seam[window - 1 :: window - overlap] = True
        seams.append(off[at_seam].mean())
        others.append(off[~at_seam].mean())
        whole, last, steady = whole + right, last + ended, steady + ((off < STEADY).mean() >= 0.9)
        note = f"{'right' if right else 'WRONG'}, at its end {'right' if ended else 'WRONG'}"
        if triple.motion != "still":
            speeds = [np.linalg.norm(part.mean(0)) for part in np.array_split(steps, max(2, asked.frames // 32))]
            kept.append([speed / speeds[0] for speed in speeds])
            note += f", speed {speeds[0]:.4f} to {speeds[-1]:.4f}"
        print(f"{triple.captions()[0]}: {note}, {(off < STEADY).mean():.0%} of steps steady", flush=True)
    print(f"{asked.prompts} videos of {asked.frames} frames, overlap {overlap}: all right over all frames in {whole},")
    print(f"over the last {window} in {last}; 90 % of the steps within {STEADY} of the median one in {steady}")
    print(f"off the median step: {np.mean(seams):.4f} at seams, {np.mean(others):.4f} elsewhere")
    print("speed over the first stretch's:", " ".join(f"{x:.2f}" for x in np.mean(kept, axis=0)))
    if asked.sheet:
        shown = [video[:, :: max(1, asked.frames // 16)] for video in videos]
        contact_sheet(shown, [triple.captions()[0] for triple in picked]).save(asked.sheet)


if __name__ == "__main__":
    main()
