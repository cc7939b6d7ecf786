"""Measure how well a model of `shapes` continues given frames.

    uv run python benchmarks/continuation.py CHECKPOINT [--clips 10] [--known 8]

Prints the mean error of the speed, and in how many clips the speed is constant and shape and colour are kept.
"""

import argparse

import numpy as np
import torch

from stdit_data.datasets.shapes import MOTIONS, ShapesDataset, render
from stdit_model.sampling import continuation as given
from stdit_train.evaluation.shape_reader import BACKGROUND, FOREGROUND_DISTANCE, STEADY, analyse, circular_center
from stdit_train.pipeline.load import load_pipeline


def steps_of(video: torch.Tensor) -> np.ndarray:
    """Return the steps of the shape's centre from frame to frame, [T - 1, 2], in units of the frame's shorter side."""
    pixels = (video.float().permute(1, 2, 3, 0).numpy() + 1.0) * 127.5
    masks = np.linalg.norm(pixels - np.asarray(BACKGROUND), axis=-1) > FOREGROUND_DISTANCE
    extent = np.asarray(masks.shape[:0:-1])
    step = np.diff(np.stack([circular_center(mask) for mask in masks]), axis=0)
    return ((step + extent / 2) % extent - extent / 2) / extent.min()


def main() -> None:
    """Continue clips of 16 frames from their first ones, and compare with the clips themselves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--known", type=int, default=8)
    parser.add_argument("--resampling-steps", type=int, default=3)
    parser.add_argument("--noisy", type=float, default=given.RESAMPLING_FROM)
    parser.add_argument(
        "--spread", type=float, default=0.5, help="spread of the start: 0.15 near the middle, 0.5 anywhere"
    )
    parser.add_argument("--guided", action="store_true")
    asked = parser.parse_args()
    given.RESAMPLING_FROM = asked.noisy
    data = ShapesDataset(seed=77, spread=asked.spread)
    scenes = [data.scene(i) for i in range(asked.clips)]
    videos = load_pipeline(asked.checkpoint)(
        [scene.caption for scene in scenes],
        num_frames=16,
        first_frames=torch.stack([render(scene, 16, 64, 64) for scene in scenes])[:, :, : asked.known],
        resampling_steps=asked.resampling_steps,
        guide_continuation=asked.guided,
        generator=[torch.Generator().manual_seed(i) for i in range(asked.clips)],
    ).frames
    errors, constant, same = [], 0, 0
    for scene, video in zip(scenes, videos, strict=True):
        true, steps = np.asarray(MOTIONS[scene.triple.motion]) * scene.speed, steps_of(video)
        if scene.triple.motion != "still":
            errors.append(np.linalg.norm(steps[asked.known - 1 :].mean(0) - true) / scene.speed)
        constant += (np.linalg.norm(steps - true, axis=1) < STEADY).mean() >= 0.9
        reading = analyse(video[:, asked.known :])
        same += (reading.colour, reading.shape) == (scene.triple.colour, scene.triple.shape)
    print(f"speed error {np.mean(errors):.0%}, constant {constant} of {asked.clips}, same {same} of {asked.clips}")


if __name__ == "__main__":
    main()
