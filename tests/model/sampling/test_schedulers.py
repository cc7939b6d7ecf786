"""Schedulers: their noise levels and timesteps, from one to another, and which can continue given frames."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from stdit_model.diffusion import shift_sigma
from stdit_model.errors import SettingsError
from stdit_model.sampling.schedulers import (
    EPSILON_SAMPLERS,
    FLOW_SAMPLERS,
    check_continuation,
    iddpm_scheduler,
    model_timestep,
    noise_level,
    predicts_velocity,
    recorded_objective,
    set_timesteps,
    use_sampler,
)


def chosen(scheduler: Any, *names: str) -> Any:
    """The scheduler after `use_sampler` with each of the names in turn."""
    pipeline = SimpleNamespace(
        scheduler=scheduler, transformer=SimpleNamespace(config=SimpleNamespace(learn_sigma=True))
    )
    for name in names:
        use_sampler(pipeline, name)
    return pipeline.scheduler


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0, **settings)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 8, 300])
def test_noise_levels_are_even_before_one_shift(name: str, steps: int) -> None:
    scheduler = chosen(flow(), name)
    set_timesteps(scheduler, steps)
    expected = shift_sigma(1.0 - torch.arange(steps, dtype=torch.float64) / steps, 4.0).float()
    torch.testing.assert_close(
        scheduler.sigmas[:-1], expected, rtol=0, atol=2e-3
    )  # theirs begin or end at 0.999, 0.001
    assert scheduler.sigmas[-1] == 0
    for step in range(steps):  # the model is told the noise that there is, not a rounded one
        assert model_timestep(scheduler, step) == pytest.approx(1000 * float(scheduler.sigmas[step]), abs=1e-3)
        assert noise_level(scheduler, step).noise == float(scheduler.sigmas[step])


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4, 300])
def test_the_exact_velocity_leads_to_the_data(name: str, steps: int) -> None:
    """All data are one point, so the straight path leads there in any number of steps, even of equal timesteps."""
    scheduler = chosen(flow(), name)
    set_timesteps(scheduler, steps)
    data, x = torch.full((1, 4, 1, 2, 2), 0.5), torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(scheduler.timesteps):
        velocity = (x - data) / (model_timestep(scheduler, step) / 1000)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, data, rtol=0, atol=1e-3)


def test_the_shift_goes_along() -> None:
    back = chosen(flow(), "unipc", "dpmsolver++", "euler")
    assert type(back).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert back.config.shift == 4.0
    assert chosen(flow(), "unipc").config.flow_shift == 4.0


@pytest.mark.parametrize("before", EPSILON_SAMPLERS)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_latents_are_never_clipped(before: str, name: str) -> None:
    config = chosen(iddpm_scheduler(), before).config
    saved = type(chosen(iddpm_scheduler(), before)).from_config({k: v for k, v in config.items() if k != "clip_sample"})
    after = chosen(saved, name)
    assert not after.config.clip_sample
    assert not after.config.thresholding


@pytest.mark.parametrize("name", EPSILON_SAMPLERS)
@pytest.mark.parametrize("zero", [False, True])
def test_the_exact_v_leads_to_the_data(name: str, zero: bool) -> None:
    scheduler = chosen(iddpm_scheduler("v_prediction", zero), name)
    set_timesteps(scheduler, 30)
    generator = torch.Generator().manual_seed(0)
    data, x = torch.full((1, 4, 1, 2, 2), 0.5), torch.randn(1, 4, 1, 2, 2, generator=generator)
    learned = {"generator": generator} if name == "ddpm" else {}
    for step, t in enumerate(scheduler.timesteps):
        level = noise_level(scheduler, step)
        epsilon = (x - level.signal * data) / level.noise
        v = level.signal * epsilon - level.noise * data
        output = torch.cat([v, torch.zeros_like(v)], 1) if name == "ddpm" else v
        x = scheduler.step(output, t, x, return_dict=False, **learned)[0]
    torch.testing.assert_close(x, data, rtol=0, atol=0.02)


def test_each_objective_has_its_samplers() -> None:
    with pytest.raises(SettingsError, match=r"sampler ddim.*rectified flow.*euler, dpmsolver\+\+, unipc"):
        chosen(flow(), "ddim")
    with pytest.raises(SettingsError, match="sampler ddim"):
        chosen(flow(), "unipc", "ddim")
    with pytest.raises(SettingsError, match=r"sampler euler.*epsilon"):
        chosen(iddpm_scheduler(), "euler")


@pytest.mark.parametrize("name", EPSILON_SAMPLERS)
@pytest.mark.parametrize("settings", [(), ("v_prediction",), ("v_prediction", True)], ids=str)
def test_noise_levels_of_epsilon_and_v_prediction(name: str, settings: tuple[Any, ...]) -> None:
    scheduler = chosen(iddpm_scheduler(*settings), name)
    assert scheduler.config.prediction_type == (settings or ("epsilon",))[0]
    assert scheduler.config.rescale_betas_zero_snr == (len(settings) == 2)
    check_continuation(scheduler)
    set_timesteps(scheduler, 10)
    for step, t in enumerate(scheduler.timesteps):
        level = noise_level(scheduler, step)
        assert level.signal**2 == pytest.approx(float(scheduler.alphas_cumprod[int(t)]), rel=1e-4)
        assert level.signal**2 + level.noise**2 == pytest.approx(1.0)
        assert level.prediction == scheduler.config.prediction_type
        assert model_timestep(scheduler, step) == float(t)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(),
        diffusers.HeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
        diffusers.DDIMScheduler(prediction_type="sample"),
        flow(invert_sigmas=True),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', 'inverted')}",
)
def test_unknown_noise_levels_are_refused(scheduler: Any) -> None:
    with pytest.raises(SettingsError, match=rf"{type(scheduler).__name__}.*cannot continue given frames.*unipc"):
        check_continuation(scheduler)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_the_objective_of_a_saved_scheduler(name: str) -> None:
    scheduler = chosen(flow(), name)
    check_continuation(scheduler)
    assert predicts_velocity(scheduler)
    class_name = type(scheduler).__name__
    assert recorded_objective(class_name, scheduler.config) is True
    assert recorded_objective(class_name, None) is (True if name == "euler" else None)
    assert recorded_objective("DDPMScheduler", None) is False
    assert recorded_objective("UniPCMultistepScheduler", chosen(iddpm_scheduler(), "unipc").config) is False
