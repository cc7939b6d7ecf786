"""The parts of a step: timesteps and weights, precisions, and what happens to a step that is not finite."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit_model import STDiTPipeline
from stdit_model.diffusion import NUM_TIMESTEPS, NoiseLevel
from stdit_model.sampling.schedulers import use_sampler
from stdit_train.build import open_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import ObjectiveConfig, TrainConfig
from stdit_train.errors import RunEnded
from stdit_train.loss.nonfinite import find_nonfinite
from stdit_train.loss.objective import loss_weight, timestep_density, timestep_of, training_loss
from stdit_train.pipeline.save import build_pipeline
from stdit_train.tracking.metrics import TimestepBins, read_metrics
from stdit_train.trainer import Trainer


class Silent:
    """A watcher that only remembers."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        self.losses.append(values.get("loss", math.nan))


def start(config: TrainConfig, folder: Path) -> tuple[Trainer, Silent]:
    watcher = Silent()
    return open_trainer(config, config, RunFolder(folder), watcher), watcher


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return from_dict(set_values(to_dict(config), {key.replace("__", "."): value for key, value in values.items()}))


def test_logit_normal_levels() -> None:
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    levels = timestep_density(uniform, ObjectiveConfig(timesteps="logit-normal", logit_mean=0.5, logit_std=0.8))
    normal = torch.logit(levels.double())
    assert normal.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert normal.std().item() == pytest.approx(0.8, abs=2e-3)
    assert torch.equal(timestep_density(uniform, ObjectiveConfig()), uniform)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction: Any) -> None:
    """Against the schedule worked out here in float64: linear betas 1e-4 to 0.02."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64), 0)
    snr = alpha_bar / (1 - alpha_bar)
    config = ObjectiveConfig(min_snr=5.0, prediction=prediction)
    weights = loss_weight(torch.arange(NUM_TIMESTEPS), config).double()
    own = snr if prediction == "epsilon" else snr + 1
    torch.testing.assert_close(weights, snr.clamp(max=5.0) / own, rtol=2e-3, atol=0)


def test_epsilon_weighted_as_v_has_the_loss_of_v() -> None:
    """Models that estimate the same clean latents have the same loss, in value and by the bound's weight."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong, spread = torch.randn(4, 8, 4, 3, 2, 2, generator=generator)
    level = torch.linspace(0.1, 0.95, 8)
    losses = []
    for name, weighting in (("epsilon", "velocity"), ("v_prediction", "own")):
        config = ObjectiveConfig(prediction=name, weighting=weighting, bound=0.5)  # type: ignore[arg-type]

        def model(x_t: Tensor, timestep: Tensor, *_: Any, name: str = name) -> Tensor:
            at = NoiseLevel.of_iddpm(timestep)
            epsilon = (x_t - at.signal * wrong) / at.noise
            return torch.cat([epsilon if name == "epsilon" else at.signal * epsilon - at.noise * wrong, spread], 1)

        terms = training_loss(model, config, x0, noise, level, torch.zeros(8, 1, 1), torch.ones(8, 1))  # type: ignore[arg-type]
        losses.append(terms["loss"])
        assert torch.equal(terms["loss"], loss_weight((level * 1000).long(), config) * terms["mse"] + 0.5 * terms["vb"])
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "flow", "prediction": "v_prediction"}, "objective.prediction needs objective.name=iddpm"),
        ({"name": "flow", "bound": 0.5}, "objective.bound needs objective.name=iddpm"),
        ({"zero_terminal_snr": True}, "set objective.prediction=v_prediction"),
        ({"min_snr": 5.0, "weighting": "velocity"}, "set one"),
    ],
)
def test_settings_of_the_objective_that_do_not_go_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ObjectiveConfig(**values)


def test_the_pipeline_of_a_run_samples_as_it_was_trained(small: TrainConfig, tmp_path: Path) -> None:
    """Saved, loaded and given another sampler, it keeps what the model predicts and the schedule."""
    config = changed(
        small,
        objective__name="iddpm",
        objective__prediction="v_prediction",
        objective__zero_terminal_snr=True,
        steps=2,
    )
    trainer, _ = start(config, tmp_path / "run")
    trainer.train()
    loaded = STDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    task: Any = trainer.task
    built = build_pipeline(trainer.ema.model, task.components, config)
    videos = []
    for pipeline in (loaded, built):
        pipeline.set_progress_bar_config(disable=True)
        for sampler in ("ddpm", "dpmsolver++"):
            use_sampler(pipeline, sampler)
            kept = pipeline.scheduler.config
            assert (kept["prediction_type"], kept["rescale_betas_zero_snr"]) == ("v_prediction", True)
            frames = pipeline("a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).frames
            assert torch.isfinite(frames).all()
            videos.append(frames)
    assert torch.equal(videos[0], videos[2]) and torch.equal(videos[1], videos[3])
    assert not torch.equal(videos[0], videos[1])


def test_min_snr_is_for_epsilon(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"min_snr.*objective.name=iddpm"):
        changed(small, objective__min_snr=5.0)


def test_losses_by_timestep() -> None:
    bins = TimestepBins(4)
    timesteps = timestep_of(torch.tensor([0.1, 0.2, 0.999, 1.0]), ObjectiveConfig())
    bins.add(timesteps.tolist(), [1.0, 2.0, 3.0, 5.0])
    saved = bins.state_dict()
    assert bins.take() == {"loss_t0-250": 1.5, "loss_t750-1000": 4.0}
    assert bins.take() == {}
    bins.load_state_dict(saved)
    assert bins.take() == {"loss_t0-250": 1.5, "loss_t750-1000": 4.0}
    shifted = timestep_of(torch.tensor([0.5]), ObjectiveConfig(name="flow", shift=3.0))
    assert shifted.item() == pytest.approx(750.0)


def test_every_option_of_the_step_trains(small: TrainConfig, tmp_path: Path) -> None:
    config = changed(
        small, objective__name="iddpm", objective__min_snr=5.0, objective__timesteps="logit-normal", steps=3
    )
    trainer, watcher = start(config, tmp_path / "run")
    trainer.train()
    assert all(map(math.isfinite, watcher.losses))
    row = next(row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    assert {"tokens_per_second", "data_wait", "memory_gib", "mse", "vb"} <= row.keys()
    assert any(name.startswith("loss_t") for name in row)


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "fp16"])
def test_half_precision_follows_float32(small: TrainConfig, tmp_path: Path, precision: str) -> None:
    """The same losses to a few per cent, and float32 masters that move by less than a bfloat16 can tell apart."""
    config = changed(small, optimizer__name="adamw", optimizer__lr=1e-4, steps=4)
    plain, expected = start(config, tmp_path / "fp32")
    plain.train()
    trainer, watcher = start(changed(config, precision=precision), tmp_path / "half")
    trainer.train()
    finite = [loss for loss in watcher.losses if math.isfinite(loss)]
    assert finite
    assert finite[0] == pytest.approx(expected.losses[0], rel=0.02)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    weight = trainer.model.blocks[0].mlp.fc1.weight
    assert not torch.equal(weight, weight.bfloat16().float())
    if precision == "bf16-weights":
        copied = dict(trainer.precision.module.named_parameters())
        assert {parameter.dtype for parameter in copied.values()} == {torch.bfloat16}
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(copied[name], parameter.bfloat16()), name
    assert ("unstable" in trainer.run.log_file.read_text()) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["bf16-weights", "fp16"])
def test_half_precision_resumes_to_the_bit(small: TrainConfig, tmp_path: Path, precision: str) -> None:
    config = changed(small, precision=precision, steps=6, checkpoint_every=3, keep_checkpoints=5)
    whole, _ = start(config, tmp_path / "run")
    whole.train()
    (whole.run.checkpoints / "step-000006").rename(tmp_path / "step-000006")
    again, _ = start(config, tmp_path / "run")
    assert again.step == 3
    again.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.precision.loss_scale == whole.precision.loss_scale


def poison(trainer: Trainer, how: str) -> list[bool]:
    """While the returned flag is set, the second block's MLP puts out infinities, or gets a gradient of them."""
    sick = [False]

    def forward(_module, _inputs, output):
        if sick[0] and how == "forward":
            return output * math.inf
        if sick[0]:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    trainer.model.blocks[1].mlp.fc2.register_forward_hook(forward)
    return sick


@pytest.mark.parametrize(("how", "named"), [("forward", "the output of blocks.1.mlp.fc2"), ("backward", "gradient")])
def test_a_step_that_is_not_finite_is_skipped_and_explained(
    small: TrainConfig, tmp_path: Path, how: str, named: str
) -> None:
    trainer, watcher = start(changed(small, steps=3), tmp_path / "run")
    before: dict[str, torch.Tensor] = {}
    real, sick = trainer.train_step, poison(trainer, how)

    def step(batches):
        sick[0] = trainer.step == 1
        if sick[0]:
            before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        values = real(batches)
        if sick[0]:
            assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        return values

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.train()
    assert [math.isfinite(loss) for loss in watcher.losses] == [True, False, True]
    line = next(line for line in trainer.run.log_file.read_text().splitlines() if "skipped" in line)
    assert "WARNING stdit_train.trainer: step 2 skipped" in line
    assert named in line


def test_a_run_that_stays_infinite_ends_with_a_checkpoint(small: TrainConfig, tmp_path: Path) -> None:
    config = changed(small, steps=50, max_skipped=3)
    trainer, _ = start(config, tmp_path / "run")
    with torch.no_grad():
        trainer.model.blocks[0].attn.qkv.bias[0] = math.nan
    with pytest.raises(RunEnded, match=r"3 steps in a row.*the weight blocks.0.attn.qkv.bias.*--resume"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").exists()


def test_what_comes_from_outside_is_blamed_first() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    bad = torch.tensor([[1.0, math.inf]])
    assert find_nonfinite(layer, {"the latents": bad}, lambda: layer(bad).sum()) == "the latents"
    good = torch.ones(1, 2)
    assert find_nonfinite(layer, {"the latents": good}, lambda: layer(good).sum()) is None
    assert find_nonfinite(layer, {"the latents": good}, lambda: layer(good).sum() * math.nan).startswith(
        "the loss itself"
    )
