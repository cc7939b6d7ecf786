"""Training objectives as pure functions: the iDDPM hybrid loss and rectified flow.

Legend: B batch, C channels, T frames, H W height and width. x0 clean latents, noise a standard normal of x0's shape.

Sources: iDDPM, arXiv:2102.09672 (eq. 14-16 and appendix A); DDPM, arXiv:2006.11239; v-prediction, arXiv:2202.00512
(appendix D); zero terminal SNR, arXiv:2305.08891 (algorithm 1); rectified flow, arXiv:2209.03003; the timestep shift,
arXiv:2403.03206 (section 5.3.2).
"""

import math
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from torch import Tensor

from stdit_model.tables import device_table

NUM_TIMESTEPS = 1000
RESAMPLING_SHARE = 0.2  # share of a step's noise that conditioning frames are shown under
# What the model predicts, by diffusers' names: the noise, v = signal noise - sigma x0, or the velocity noise - x0.
Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]
_CLAMP = 1e-12  # smallest probability in the decoder's likelihood


class _Schedule(NamedTuple):
    """Constants of the forward process: in rows over the 1000 timesteps, or at those of a batch, [B, 1, 1, 1, 1]."""

    signal: Tensor  # sqrt(alpha_bar)
    sigma: Tensor  # sqrt(1 - alpha_bar)
    inverse_signal: Tensor  # 1 / signal; infinite at zero terminal SNR
    inverse_ratio: Tensor  # sigma / signal; likewise
    log_beta: Tensor
    posterior_log_variance: Tensor  # log beta~, with its t=0 value (log 0) replaced by that of t=1
    posterior_x0: Tensor  # coefficient of x0 in the posterior mean
    posterior_xt: Tensor  # coefficient of x_t in the posterior mean


def _zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """Rescale betas so that nothing of the signal is left after the last one (arXiv:2305.08891, algorithm 1)."""
    signal = np.sqrt(np.cumprod(1.0 - beta))
    alpha_bar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def _make_schedule(zero_terminal_snr: int, _scale: float) -> np.ndarray:
    """Compute the constants, [8, 1000] float32, a row for each field of `_Schedule`; in float64."""
    beta = np.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=np.float64)
    if zero_terminal_snr:
        beta = _zero_terminal_snr(beta)
    alpha_bar = np.cumprod(1.0 - beta)
    previous = np.append(1.0, alpha_bar[:-1])
    posterior_variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / alpha_bar
    rows = (
        np.sqrt(alpha_bar),
        np.sqrt(1.0 - alpha_bar),
        np.sqrt(inverse),
        np.sqrt(inverse - 1.0),
        np.log(beta),
        np.log(np.append(posterior_variance[1], posterior_variance[1:])),
        beta * np.sqrt(previous) / (1.0 - alpha_bar),
        (1.0 - previous) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar),
    )
    return np.stack(rows).astype(np.float32)


_schedule_table = device_table(
    "diffusion_schedule", _make_schedule, lambda _zero_terminal_snr: (len(_Schedule._fields), NUM_TIMESTEPS)
)


def _schedule(timestep_B: Tensor, zero_terminal_snr: bool = False) -> _Schedule:
    """Return the constants at the timesteps of a batch."""
    table = _schedule_table((int(zero_terminal_snr),), 1.0, timestep_B.device, torch.float32)
    return _Schedule(*table[:, timestep_B.long(), None, None, None, None])


def _mean(x: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean over all axes but the batch, of all frames or of those in loss_mask [B, T]: [B, C, T, H, W] -> [B]."""
    if loss_mask is None:
        return x.flatten(1).mean(1)
    weight_BT = loss_mask.to(x.dtype)
    return (x.mean((1, 3, 4)) * weight_BT).sum(1) / weight_BT.sum(1)


def add_noise(x0: Tensor, noise: Tensor, timestep: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """Add noise: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (DDPM, eq. 4).

    Args:
        x0, noise: [B, C, T, H, W].
        timestep: [B] integers in 0..999.
        zero_terminal_snr: scale the schedule so that timestep 999 is noise alone.
    """
    schedule = _schedule(timestep, zero_terminal_snr)
    return schedule.signal * x0 + schedule.sigma * noise


def signal_to_noise(timestep: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) of timesteps in 0..999: [B] -> [B]."""
    schedule = _schedule(timestep, zero_terminal_snr)
    return ((schedule.signal / schedule.sigma) ** 2).flatten()


def iddpm_loss(
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    loss_mask: Tensor | None = None,
    prediction: Prediction = "epsilon",
    zero_terminal_snr: bool = False,
) -> dict[str, Tensor]:
    """Compute the hybrid objective of iDDPM with a learned-range variance: loss = mse + vb.

    Args:
        output: the model's [B, 2C, T, H, W] for `add_noise(x0, noise, timestep)`: the prediction, then the variance
            interpolation v, log variance = f log beta + (1 - f) log beta~ with f = (v + 1) / 2.
        x0, noise: [B, C, T, H, W].
        timestep: [B] integers in 0..999.
        loss_mask: [B, T] bool, frames that the loss is computed on, at least one for each clip; None for all.
        prediction: "epsilon", or "v_prediction" for sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0.
        zero_terminal_snr: as for `add_noise`; epsilon says nothing about x0 at timestep 999 then.

    Returns:
        loss, mse and vb, each [B] float32. vb is the variational bound in bits per dimension, not rescaled; its mean
        prediction is detached, so that it trains only the variance.

    Raises:
        ValueError: output does not have twice the channels of x0.
    """
    if output.shape[1] != 2 * x0.shape[1]:
        raise ValueError(
            f"the iDDPM loss needs {2 * x0.shape[1]} output channels (epsilon and variance), not {output.shape[1]}: "
            "build the model with learn_sigma=True, or train with the rectified-flow objective"
        )
    output, x0, noise = output.float(), x0.float(), noise.float()
    predicted, v = output.chunk(2, dim=1)
    at = _schedule(timestep, zero_terminal_snr)
    target = noise if prediction == "epsilon" else at.signal * noise - at.sigma * x0
    mse = _mean((predicted - target) ** 2, loss_mask)
    x_t = at.signal * x0 + at.sigma * noise
    if prediction == "epsilon":
        x0_predicted = at.inverse_signal * x_t - at.inverse_ratio * predicted.detach()
    else:
        x0_predicted = at.signal * x_t - at.sigma * predicted.detach()
    vb = _variational_bound(x0_predicted, v, x0, x_t, timestep, at, loss_mask)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _variational_bound(
    x0_predicted: Tensor,
    v: Tensor,
    x0: Tensor,
    x_t: Tensor,
    timestep: Tensor,
    at: _Schedule,
    loss_mask: Tensor | None,
) -> Tensor:
    """One term of the bound in bits per dimension, [B]: KL(q || p) for t > 0, the decoder's NLL at t = 0."""
    fraction = (v + 1) / 2
    log_variance = fraction * at.log_beta + (1 - fraction) * at.posterior_log_variance

    mean_true = at.posterior_x0 * x0 + at.posterior_xt * x_t
    mean_predicted = at.posterior_x0 * x0_predicted + at.posterior_xt * x_t

    kl = 0.5 * (
        -1.0
        + log_variance
        - at.posterior_log_variance
        + torch.exp(at.posterior_log_variance - log_variance)
        + (mean_true - mean_predicted) ** 2 * torch.exp(-log_variance)
    )
    nll = -discretized_gaussian_log_likelihood(x0, mean_predicted, 0.5 * log_variance)
    return torch.where(timestep.long() == 0, _mean(nll, loss_mask), _mean(kl, loss_mask)) / math.log(2.0)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute log p(x) of values in [-1, 1] quantised to 256 levels, elementwise, in nats (DDPM, eq. 13).

    Uses the tanh approximation of the normal CDF, as iDDPM's release does.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    lower = _normal_cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    log_inside = torch.log((upper - lower).clamp(min=_CLAMP))
    log_below = torch.log(upper.clamp(min=_CLAMP))
    log_above = torch.log((1.0 - lower).clamp(min=_CLAMP))
    return torch.where(x < -0.999, log_below, torch.where(x > 0.999, log_above, log_inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Shift noise levels towards 1: shift * sigma / (1 + (shift - 1) * sigma); shift 1 changes nothing."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def flow_interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Interpolate on the straight path of rectified flow: (1 - sigma) x0 + sigma noise, sigma [B] in 0..1.

    The model's timestep is 1000 * sigma, as in diffusers' flow-matching schedulers.
    """
    s = sigma.float()[:, None, None, None, None]
    return (1.0 - s) * x0 + s * noise


def flow_loss(output: Tensor, x0: Tensor, noise: Tensor, loss_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the squared error of the predicted velocity noise - x0 of rectified flow.

    Args:
        output: the model's [B, C or 2C, T, H, W]; variance channels, if any, are ignored.
        x0, noise: [B, C, T, H, W].
        loss_mask: [B, T] bool, frames that the loss is computed on, at least one for each clip; None for all.

    Returns:
        loss and mse (the same), each [B] float32.
    """
    velocity = output[:, : x0.shape[1]].float()
    mse = _mean((velocity - (noise.float() - x0.float())) ** 2, loss_mask)
    return {"loss": mse, "mse": mse}


class NoiseLevel(NamedTuple):
    """A noise level: x = signal * clean + noise * epsilon; floats, or [B, 1, 1, 1, 1] with a level for each clip.

    For "flow_prediction" signal = 1 - noise, else signal^2 + noise^2 = 1.
    """

    signal: float | Tensor
    noise: float | Tensor
    prediction: Prediction

    @classmethod
    def of_flow(cls, sigma: Tensor) -> "NoiseLevel":
        """Return the noise levels of rectified flow at sigma [B] in 0..1."""
        sigma = sigma.float()[:, None, None, None, None]
        return cls(1.0 - sigma, sigma, "flow_prediction")

    @classmethod
    def of_iddpm(
        cls, timestep: Tensor, prediction: Prediction = "epsilon", zero_terminal_snr: bool = False
    ) -> "NoiseLevel":
        """Return the noise levels of iDDPM at timesteps [B] in 0..999."""
        schedule = _schedule(timestep, zero_terminal_snr)
        return cls(schedule.signal, schedule.sigma, prediction)

    def noised(self, clean: Tensor, epsilon: Tensor, share: float = 1.0) -> Tensor:
        """Add a share of this noise to clean latents [B, C, T, H, W], and scale the signal accordingly."""
        noise = share * self.noise
        signal = 1.0 - noise if self.prediction == "flow_prediction" else (1.0 - noise**2) ** 0.5
        return signal * clean + noise * epsilon

    def clean(self, x: Tensor, prediction: Tensor) -> Tensor:
        """Estimate the clean latents from noisy ones and the model's prediction, each [B, C, T, H, W]."""
        match self.prediction:
            case "flow_prediction":
                return x - self.noise * prediction
            case "v_prediction":
                return self.signal * x - self.noise * prediction
            case "epsilon":
                return (x - self.noise * prediction) / self.signal
            case _:
                assert_never(self.prediction)
