"""What iDDPM's model predicts, epsilon or v, with and without zero terminal SNR: against diffusers, and one another."""

from typing import Any, get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from torch import Tensor

from stdit_model.diffusion import (
    NUM_TIMESTEPS,
    NoiseLevel,
    Prediction,
    add_noise,
    flow_interpolate,
    iddpm_loss,
    signal_to_noise,
)
from stdit_model.sampling.schedulers import iddpm_scheduler

ALL = torch.arange(NUM_TIMESTEPS)


def draw(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 3, 2, 2, generator=generator), torch.randn(batch, 4, 3, 2, 2, generator=generator)


def v_of(x0: Tensor, noise: Tensor, timestep: Tensor, zero: bool) -> Tensor:
    return add_noise(noise, -x0, timestep, zero)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64))
    alpha_bar = torch.cumprod(1 - betas, 0)
    one = torch.ones(NUM_TIMESTEPS, 1, 1, 1, 1)
    signal, sigma = (add_noise(*pair, ALL, True).flatten() for pair in ((one, 0 * one), (0 * one, one)))
    torch.testing.assert_close(signal.double(), alpha_bar.sqrt(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sigma.double(), (1 - alpha_bar).sqrt(), rtol=1e-5, atol=1e-7)
    assert (signal[-1], sigma[-1]) == (0, 1)
    snr = signal_to_noise(ALL, True)
    torch.testing.assert_close(snr[:-1].double(), (alpha_bar / (1 - alpha_bar))[:-1], rtol=1e-4, atol=0)
    assert snr[-1] == 0 < signal_to_noise(ALL)[-1]


@pytest.mark.parametrize("zero", [False, True])
def test_v_is_that_of_diffusers(zero: bool) -> None:
    x0, noise = draw(NUM_TIMESTEPS)
    scheduler = iddpm_scheduler("v_prediction", zero)
    torch.testing.assert_close(v_of(x0, noise, ALL, zero), scheduler.get_velocity(x0, noise, ALL), rtol=0, atol=1e-5)
    exact = torch.cat([v_of(x0, noise, ALL, zero), torch.zeros_like(x0)], dim=1)
    assert iddpm_loss(exact, x0, noise, ALL, None, "v_prediction", zero)["mse"].max() < 1e-10
    x_t = add_noise(x0, noise, ALL, zero)
    for t in (0, 1, 500, 999):
        estimate = scheduler.step(exact[t, None], t, x_t[t, None]).pred_original_sample
        torch.testing.assert_close(estimate, x0[t, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_clean_latents_of_an_exact_prediction(prediction: Any) -> None:
    x0, noise = draw(8)
    timestep = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900])
    if prediction == "flow_prediction":
        level, exact, x = NoiseLevel.of_flow(timestep / 1000), noise - x0, flow_interpolate(x0, noise, timestep / 1000)
    else:
        level = NoiseLevel.of_iddpm(timestep, prediction)
        exact = noise if prediction == "epsilon" else v_of(x0, noise, timestep, False)
        x = add_noise(x0, noise, timestep)
    torch.testing.assert_close(level.noised(x0, noise), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(level.clean(x, exact), x0, rtol=0, atol=1e-4)


def test_v_and_epsilon_are_one_estimate_with_two_weights() -> None:
    """The same x0: an error of v is one of epsilon times (SNR + 1) / SNR, and the variational bounds are the same."""
    x0, noise = draw(NUM_TIMESTEPS)
    x_t, wrong, (range_,) = add_noise(x0, noise, ALL), x0 + 0.3 * noise.flip(0), draw(NUM_TIMESTEPS)[:1]
    at = NoiseLevel.of_iddpm(ALL)
    epsilon = (x_t - at.signal * wrong) / at.noise
    v = at.signal * epsilon - at.noise * wrong
    terms = iddpm_loss(torch.cat([epsilon, range_], 1), x0, noise, ALL)
    others = iddpm_loss(torch.cat([v, range_], 1), x0, noise, ALL, None, "v_prediction")
    snr, late = signal_to_noise(ALL), ALL > 20  # below, float32 loses the small errors of epsilon
    torch.testing.assert_close(others["mse"][late], (terms["mse"] * (snr + 1) / snr)[late], rtol=2e-3, atol=0)
    torch.testing.assert_close(others["vb"][late], terms["vb"][late], rtol=1e-2, atol=1e-4)


def test_the_bound_at_zero_terminal_snr_is_finite_and_trains_the_variance_alone() -> None:
    x0, noise = draw(NUM_TIMESTEPS)
    output = torch.randn(NUM_TIMESTEPS, 8, 3, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    terms = iddpm_loss(output, x0, noise, ALL, None, "v_prediction", True)
    assert all(torch.isfinite(term).all() for term in terms.values())
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), output)
    assert torch.isfinite(gradient).all() and gradient[:, 4:].abs().sum() > 0
    assert not gradient[:, :4].any()
