"""Measure the VAEs of temporal_vae.py on clips that they were not trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from temporal_vae_report import SHAPES
from torch import Tensor

from stdit_data.datasets.shapes import ShapesDataset, Triple
from stdit_model.causal_vae.quantization import code_bits
from stdit_train.components.load import load_vae
from stdit_train.config.schema import DataConfig
from stdit_train.data.videos import open_clips
from stdit_train.evaluation.shape_reader import analyse
from stdit_train.evaluation.video_metrics import flicker, psnr, ssim
from stdit_train.vae.networks import reconstruct

FRAMES, SIDE = SHAPES
CHECKED = 64  # clips that a VAE is measured on

Checked = tuple[Tensor, Triple | None]  # a video [C, T, H, W] in [-1, 1], and what it shows where that is known


def shapes_clips() -> Iterator[Checked]:
    """Yield validation clips of `shapes`."""
    clips = ShapesDataset(split="val", frames=FRAMES, height=SIDE, width=SIDE, spread=0.5)
    for index in range(CHECKED):
        yield clips.load(index, seed=0, epoch=0).video, clips.scene(index).triple


def real_clips(data: DataConfig) -> Iterator[Checked]:
    """Yield moments of the videos of `data.validation_source`, the same for every VAE."""
    assert data.validation_source is not None
    clips = open_clips(replace(data, source=data.validation_source, crop="center"))
    for index in range(CHECKED):
        yield clips.load(index % len(clips), seed=0, epoch=index // len(clips)).video, None


@torch.no_grad()
def vae_row(source: str, clips: Iterable[Checked]) -> dict[str, Any]:
    """Return the means of what a VAE, such as that of a finished run, makes of clips."""
    vae = load_vae(source, torch.device("cpu"))
    rows: list[dict[str, float]] = []
    for video, shown in clips:
        again, mean_, log_variance = reconstruct(vae, video[None])
        again = again[0].clamp(-1.0, 1.0)
        row = {"psnr": psnr(again, video), "ssim": ssim(again, video)}
        row |= {"flicker": flicker(again), "flicker_original": flicker(video), "bits": bits(vae, mean_, log_variance)}
        if shown is not None:
            row["read"] = float(analyse(again).matches(shown)["all"])
        for t in range(FRAMES):
            row |= {
                f"psnr_{t}": psnr(again[:, t], video[:, t]),
                f"ssim_{t}": ssim(again[:, t : t + 1], video[:, t : t + 1]),
            }
        rows.append(row)
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def bits(vae: Any, means: torch.Tensor, log_variance: torch.Tensor) -> float:
    """Return an upper bound of the bits that a clip's latents carry [1, C, T, h, w].

    It is the divergence of the posterior from the normal distribution that each channel has over all clips; of codes,
    the logarithm of their number.
    """
    if (levels := vae.config.get("levels")) is not None:
        return code_bits(levels) * means[0, 0].numel()
    center, deviation = (
        torch.tensor(vae.config[key]).reshape(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    ratio = log_variance.exp() / deviation**2
    nats = 0.5 * (ratio + ((means - center) / deviation) ** 2 - 1.0 - ratio.log())
    return float(nats.sum() / torch.log(torch.tensor(2.0)))
