"""The decoder that is trained on samples: what its targets are, that they are learned, and that the encoder stays."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_data.datasets.shapes import Scene, ShapesDataset, Triple, render
from stdit_model import video_vae
from stdit_train.assets import demo_folder
from stdit_train.demo.decoder import (
    DecoderConfig,
    SampledFrames,
    _batches,
    _fit,
    sample_frames,
    train_decoder_on_samples,
)
from stdit_train.pipeline.load import load_pipeline


def scene(shape: str = "cross", motion: str = "right") -> Scene:
    return Scene(Triple("red", shape, motion), "", 0.5, 0.4, 0.19, 0.025)


def test_the_target_of_a_true_clip_is_the_clip() -> None:
    video = render(scene(), 8, 64, 64)
    fit_T3 = _fit(video, scene())
    assert fit_T3 is not None
    sampled = SampledFrames(torch.zeros(8, 4, 8, 8), fit_T3, [scene()] * 8)
    target = sampled.frames(np.arange(8), 64, 64).transpose(0, 1)
    assert (target - video).abs().max() < 0.02


@pytest.mark.parametrize("wrong", [scene("circle"), scene(motion="left")])
def test_a_clip_that_shows_something_else_has_no_target(wrong: Scene) -> None:
    assert _fit(render(scene(), 8, 64, 64), wrong) is None
    assert _fit(torch.full((3, 8, 64, 64), -0.8), scene()) is None


def test_batches_of_clips_and_single_frames() -> None:
    config = DecoderConfig(sampled_clips=40, sampling_steps=(4, 20), single_frames=0.25)
    batches = [batch for _, batch in _batches(config, 16)]
    frames = {1: 0, 16: 0}
    seen: set[int] = set()
    for clips, length, steps in batches:
        frames[length] += len(clips) * length
        assert steps in (4, 20) and not seen.intersection(clips)
        seen.update(clips)
    assert frames[16] == 640 and frames[1] / (frames[1] + frames[16]) == pytest.approx(0.25, abs=0.01)
    assert [done for done, _ in _batches(config, 16)][-1] == 40
    assert all(length == 16 for _, length, _ in (b for _, b in _batches(DecoderConfig(single_frames=0.0), 16)))


def test_sampled_and_trained() -> None:
    pipeline = load_pipeline(str(demo_folder()))
    pipeline.set_progress_bar_config(disable=True)
    config = DecoderConfig(sampled_clips=2, sampling_steps=(4,), steps=20, batch=4, encoded=2, lr=2e-4)
    sampled = sample_frames(pipeline, config, lambda done: None)
    assert len(sampled) == len(sampled.fits) == len(sampled.scenes) >= 16
    frames = ShapesDataset(frames=1).load(0).video.transpose(0, 1)
    before: Tensor = pipeline.vae.encode(frames).latent_dist.mean

    def error() -> float:
        video = video_vae.decode(pipeline.vae, sampled.latents[:16].float().transpose(0, 1)[None])[0]
        return float(F.l1_loss(video.transpose(0, 1), sampled.frames(np.arange(16), 64, 64)))

    torch.manual_seed(0)
    for parameter in pipeline.vae.decoder.parameters():  # the bundled decoder has been trained so already
        parameter.data += 0.02 * torch.randn_like(parameter)
    untrained, steps = error(), []
    vae = train_decoder_on_samples(pipeline.vae, sampled, config, lambda step, loss: steps.append(step))
    assert steps == list(range(1, 21)) and error() < untrained
    assert torch.allclose(vae.encode(frames).latent_dist.mean, before, atol=1e-5)  # another memory layout
    assert all(parameter.requires_grad for parameter in vae.parameters())
