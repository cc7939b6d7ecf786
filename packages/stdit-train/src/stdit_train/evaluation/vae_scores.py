"""Score a VAE by itself: PSNR, SSIM and flicker of clips that it has encoded and decoded, also by frame position.

C channels, T frames, H W pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from statistics import mean
from typing import Any

from torch import Tensor

from stdit_data.clip import Clip
from stdit_data.transforms import to_float
from stdit_model import video_vae
from stdit_model.causal_vae.quantization import codes_to_indices
from stdit_train.evaluation.confidence import Interval, mean_interval
from stdit_train.evaluation.video_metrics import flicker, psnr, ssim


@dataclass(frozen=True)
class VaeScores:
    """Scores of a VAE's reconstructions.

    Attributes:
        measures: means over clips, by name. Flicker is that of the originals and of the reconstructions.
        positions: mean PSNR (dB) and SSIM over clips of each frame position.
        pairs: the first clips, [3, T, H, W] each, as original and reconstruction.
        codes: of a VAE whose latents are codes, how many of all there are were used; else None.
    """

    measures: dict[str, Interval]
    positions: list[tuple[float, float]]
    pairs: list[tuple[Tensor, Tensor]]
    codes: tuple[int, int] | None = None


def evaluate_vae(
    vae: Any, clips: Iterable[Clip], shown: int = 4, on_progress: Callable[[int], None] = lambda done: None
) -> VaeScores:
    """Encode clips of one length to the mean of their posteriors, decode them, and measure what comes back.

    Args:
        vae: image or video VAE.
        clips: clips of one length.
        shown: pairs to return.
        on_progress: called with the number of clips done.

    Raises:
        SettingsError: the VAE cannot take frames of this size; the message has the nearest that it can.
        ConfigError: frames are too small for SSIM.
    """
    device = next(vae.parameters()).device
    levels, used = vae.config.get("levels"), set[int]()
    rows: list[dict[str, float]] = []
    by_frame: list[list[tuple[float, float]]] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for done, clip in enumerate(clips, start=1):
        video = to_float(clip.video)
        video_vae.latent_shape(vae, *video.shape[1:])
        moments = video_vae.encode_moments(vae, video[None].to(device))
        if levels is not None:
            used.update(codes_to_indices(moments.chunk(2, dim=1)[0], levels).unique().tolist())
        latents = video_vae.sample_latents(vae, moments)
        again = video_vae.decode(vae, latents, frames=video.shape[1])[0].cpu()
        row = {"PSNR (dB)": psnr(again, video), "SSIM": ssim(again, video)}
        if video.shape[1] >= 3:
            row |= {"flicker of originals": flicker(video), "flicker of reconstructions": flicker(again)}
        rows.append(row)
        frames = zip(again.split(1, dim=1), video.split(1, dim=1), strict=True)
        by_frame.append([(psnr(made, true), ssim(made, true)) for made, true in frames])
        if len(pairs) < shown:
            pairs.append((video, again))
        on_progress(done)
    positions = [(mean(p for p, _ in column), mean(s for _, s in column)) for column in zip(*by_frame, strict=True)]
    measures = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    return VaeScores(measures, positions, pairs, None if levels is None else (len(used), prod(levels)))
