"""Training to go on from given frames: which are given, what the model sees of them, what counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stdit_model import STDiTPipeline
from stdit_model.diffusion import RESAMPLING_SHARE, add_noise, flow_interpolate, flow_loss, iddpm_loss
from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import ObjectiveConfig, TrainConfig
from stdit_train.loss.objective import given_frames, training_loss

UNIFORM = st.floats(0, 1, exclude_max=True, width=32)


@given(UNIFORM, UNIFORM, st.floats(0, 1, width=32), st.integers(1, 40))
def test_the_first_frames_and_never_all(first: float, second: float, share: float, frames: int) -> None:
    (mine,) = given_frames(torch.tensor([[first, second]]), share, frames).tolist()
    assert len(mine) == frames and not mine[-1]
    assert sorted(mine, reverse=True) == mine  # they come first
    assert mine[0] == (torch.tensor(first).item() < share and frames > 1)


def test_every_number_of_frames_is_as_likely() -> None:
    draws = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    counts = given_frames(draws, 0.5, 5).sum(1).bincount(minlength=5)
    assert abs(counts[0] - 2000) < 150 and (counts[1:] - 500).abs().max() < 90


class Seen:
    """A model that keeps what it is shown and answers with what it is told to."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.x = x
        return self.answer


@pytest.mark.parametrize("name", ["flow", "iddpm"])
def test_given_frames_are_shown_nearly_clean_and_count_for_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 6, 4, 4, generator=generator), torch.randn(2, 4, 6, 4, 4, generator=generator)
    mine = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    answer = torch.randn(2, 4 if name == "flow" else 8, 6, 4, 4, generator=generator)
    model, level = Seen(answer), torch.tensor([0.7, 0.7])
    config = ObjectiveConfig(name=name)  # type: ignore[arg-type]
    terms = training_loss(model, config, x0, noise, level, torch.zeros(2, 1, 1), torch.ones(2, 1), given=mine)  # type: ignore[arg-type]

    timestep = (level * 1000).long()
    noisy = flow_interpolate(x0, noise, level) if name == "flow" else add_noise(x0, noise, timestep)
    assert torch.equal(model.x[1], noisy[1]) and torch.equal(model.x[0, :, 2:], noisy[0, :, 2:])
    little = RESAMPLING_SHARE * (
        0.7 if name == "flow" else float(add_noise(torch.zeros(1), torch.ones(1), timestep[:1]))
    )
    signal = 1 - little if name == "flow" else (1 - little**2) ** 0.5
    assert torch.allclose(model.x[0, :, :2], signal * x0[0, :, :2] + little * noise[0, :, :2], atol=1e-5)

    def loss(frames: slice, clip: int) -> Tensor:
        parts = answer[clip, None, :, frames], x0[clip, None, :, frames], noise[clip, None, :, frames]
        return (flow_loss(*parts) if name == "flow" else iddpm_loss(*parts, timestep[:1]))["loss"][0]

    assert torch.allclose(terms["loss"], torch.stack([loss(slice(2, 6), 0), loss(slice(0, 6), 1)]), rtol=1e-5)


def test_a_run_whose_model_goes_on_from_given_frames(small: TrainConfig, tmp_path: Path) -> None:
    """Micro-batches change nothing, and the pipeline that it leaves needs no resampling."""
    losses = []
    for micro in (4, 1):
        values = {"objective.conditioning_share": 0.7, "data.later": 0.5, "micro_batch": micro, "steps": 3}
        run = RunFolder(tmp_path / str(micro))
        config = from_dict(set_values(to_dict(small), values))
        run.create(config)
        trainer = build_trainer(config, run, NullCallback())
        losses.append(trainer.train().values["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    pipeline = STDiTPipeline.from_pretrained(tmp_path / "4" / "pipeline")
    assert pipeline.config.resampling_steps == 0
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("a red circle", num_frames=10, window=4, overlap=2, num_inference_steps=1).frames
    assert video.shape == (1, 3, 10, 16, 16)


def test_given_frames_of_later_clips_alone(small: TrainConfig, tmp_path: Path) -> None:
    values = {
        "objective.conditioning_share": 1.0,
        "objective.conditioning_clips": "later",
        "data.later": 0.5,
        "data.clips": 40,
    }
    config = from_dict(set_values(to_dict(small), values))
    run = RunFolder(tmp_path / "run")
    run.create(config)
    trainer = build_trainer(config, run, NullCallback())
    (batch,) = next(iter(trainer.loader))
    later = torch.tensor([start > 0 for start in batch.starts or ()])
    assert 0 < later.sum() < len(later)
    mine = trainer.batch_loss._given(batch, torch.rand(len(later), 2), 4)
    assert mine is not None and torch.equal(mine.any(1), later) and not mine.all(1).any()


def test_shares_and_spreads_that_make_no_sense(small: TrainConfig) -> None:
    nothing_later: dict[str, object] = {"objective.conditioning_share": 1.0, "objective.conditioning_clips": "later"}
    for values in ({"objective.conditioning_share": 1.5}, {"data.spread": 0.6}, nothing_later):
        with pytest.raises(ConfigError, match=list(values)[-1]):
            from_dict(set_values(to_dict(small), values))
