"""Train the decoder of the demo's VAE on latents that the transformer samples.

Sampled latents differ from encoded ones, and a decoder that has seen encoded frames alone turns the difference into
dented outlines. What a sampled frame should look like is known in this world: the shape that its prompt names, in the
prompt's colour, at the centre and size that fit best what the decoder makes of it so far.

B batch, C channels, T frames, H W pixels, h w latents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from stdit_data.datasets.shapes import COLOURS, Scene, ShapesDataset, paint
from stdit_model import video_vae
from stdit_train.evaluation.outline import draw, fit_shape, shape_coverage
from stdit_train.evaluation.shape_reader import analyse

RADII = (0.165, 0.215)  # of what is drawn, in units of the frame's shorter side: those of `shapes`, and a little
FRESH = 1 << 20  # index of the first clip: none that the transformer is trained on


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder is trained on, and for how long.

    Sampling with few and with many steps leaves different errors, so both are shown. Encoded frames are mixed in, with
    a little noise, so that the decoder does not forget them.
    """

    sampled_clips: int = 1600
    sampling_steps: tuple[int, ...] = (8, 6, 8, 12)
    single_frames: float = 0.2  # share of the sampled frames that are pictures of their own
    steps: int = 9000
    batch: int = 16  # sampled frames a step
    encoded: int = 4  # encoded frames a step
    noise: float = 0.1  # largest standard deviation of the noise on encoded frames, in units of the latents'
    lr: float = 1.5e-3
    seed: int = 0


@dataclass(frozen=True)
class SampledFrames:
    """Sampled latents, and what they should look like.

    Attributes:
        latents: normalised latents [N, C, h, w], float16.
        fits: centre and radius of each frame's shape in pixels, (x, y, radius), [N, 3].
        scenes: the scene of each frame, of which colour and shape count.
    """

    latents: Tensor
    fits: np.ndarray
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.latents)

    def frames(self, indices: np.ndarray, height: int, width: int) -> Tensor:
        """Draw what the latents of `indices` should look like, [B, 3, H, W] in [-1, 1]."""
        drawn = []
        for index in indices:
            triple = self.scenes[index].triple
            coverage_1HW = draw(self.fits[index][None], triple.shape, height, width)
            drawn.append(paint(coverage_1HW.astype(np.float32), COLOURS[triple.colour])[:, 0])
        return torch.stack(drawn)


@torch.no_grad()
def sample_frames(pipeline: Any, config: DecoderConfig, on_clip: Callable[[int], None]) -> SampledFrames:
    """Sample clips and single frames by captions of the training split, and fit the shape to each frame.

    Clips that do not show what their caption says are left out.

    Args:
        pipeline: an `STDiTPipeline` of the demo's world.
        config: how many, and with how many steps.
        on_clip: called with the number of clips sampled.
    """
    size, frames = pipeline.config.height, pipeline.config.num_frames
    latents, fits, scenes = [], [], []
    data = ShapesDataset(seed=config.seed)
    for done, (clips, length, steps) in _batches(config, frames):
        batch = [data.scene(FRESH + index) for index in clips]
        generators = [torch.Generator().manual_seed(FRESH + index) for index in clips]
        z_BCThw = pipeline(
            [scene.caption for scene in batch], num_frames=length, height=size, width=size, num_inference_steps=steps,
            generator=generators, output_type="latent",
        ).frames  # fmt: skip
        for z_CThw, video, scene in zip(z_BCThw, video_vae.decode(pipeline.vae, z_BCThw), batch, strict=True):
            fit_T3 = _fit(video, scene)
            if fit_T3 is not None:
                latents.append(z_CThw.transpose(0, 1).half())
                fits.append(fit_T3)
                scenes.extend([scene] * length)
        on_clip(done)
    if not scenes:
        return SampledFrames(torch.empty(0), np.empty((0, 3)), [])
    return SampledFrames(torch.cat(latents), np.concatenate(fits), scenes)


def train_decoder_on_samples(
    vae: AutoencoderKL, sampled: SampledFrames, config: DecoderConfig, on_step: Callable[[int, float], None]
) -> AutoencoderKL:
    """Train the decoder alone; the encoder, and so what the transformer has learned, does not change.

    The loss is L1 plus MSE: MSE alone leaves soft edges.

    Args:
        vae: the demo's VAE.
        sampled: latents with what they should look like.
        config: steps, batch, rate.
        on_step: called with (step, loss) after each step.
    """
    vae.requires_grad_(False).to(memory_format=torch.channels_last)  # a sixth faster on CPUs
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    size = vae.config.sample_size
    encoded = ShapesDataset(frames=1, height=size, width=size, seed=config.seed + 1, spread=0.5)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.03)
    rng, generator = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        indices = rng.integers(len(sampled), size=config.batch)
        x_BCHW = torch.stack([encoded.load(step * config.encoded + i).video[:, 0] for i in range(config.encoded)])
        target_BCHW = torch.cat([sampled.frames(indices, size, size), x_BCHW])
        with torch.no_grad():
            z_BChw = vae.encode(x_BCHW).latent_dist.sample(generator=generator)
        level = config.noise * torch.rand(len(z_BChw), 1, 1, 1, generator=generator)
        z_BChw = z_BChw + std * level * torch.randn(z_BChw.shape, generator=generator)
        z_BChw = torch.cat([sampled.latents[indices].float() * std + mean, z_BChw])
        decoded = vae.decode(z_BChw).sample
        loss = F.l1_loss(decoded, target_BCHW) + F.mse_loss(decoded, target_BCHW)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    return vae.requires_grad_(True)


def _batches(config: DecoderConfig, frames: int) -> Iterator[tuple[int, tuple[range, int, int]]]:
    """Yield (clips done, (their indices, frames of each, sampling steps)), clips and single frames in turn."""
    size, done, number = 16, 0, 0
    while done < config.sampled_clips:
        steps = config.sampling_steps[number % len(config.sampling_steps)]
        clips = range(done, min(done + size, config.sampled_clips))
        done, number = clips.stop, number + 1
        yield done, (clips, frames, steps)
        singles = round(len(clips) * frames * config.single_frames / (1 - config.single_frames))
        if singles:
            first = config.sampled_clips + clips.start * frames
            yield done, (range(first, first + singles), 1, steps)


def _fit(video: Tensor, scene: Scene) -> np.ndarray | None:
    """Fit the scene's shape to each frame of a video [3, T, H, W]: [T, 3], or None if it does not show the scene.

    Shapes of this world have a constant size, so the radius is the median over the frames.
    """
    right = analyse(video).matches(scene.triple)
    coverage_THW = shape_coverage(video)
    if not (right["all"] and coverage_THW.any((1, 2)).all()):
        return None
    fit_T3 = fit_shape(coverage_THW, scene.triple.shape)
    side = min(video.shape[-2:])
    fit_T3[:, 2] = np.clip(np.median(fit_T3[:, 2]), RADII[0] * side, RADII[1] * side)
    return fit_T3
