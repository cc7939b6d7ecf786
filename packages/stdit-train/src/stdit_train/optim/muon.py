"""torch's Muon, with float32 on a CPU, where products of small bfloat16 matrices take three times as long."""

from collections.abc import Callable

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """Momentum with orthogonalised updates of matrices (Jordan et al. 2024).

    Arguments, state, and the step on other devices are those of `torch.optim.Muon`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients; return the result of the closure."""
        if any(weight.device.type != "cpu" for group in self.param_groups for weight in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum, state = group["momentum"], self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad, memory_format=torch.preserve_format)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum) if group["nesterov"] else average
                update = orthogonalised(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.to(weight.dtype), alpha=-_rate(group["lr"], group["adjust_lr_fn"], weight.shape))
        return loss


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate U V^T of a matrix U S V^T by Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x.

    Args:
        matrix: [m, n]; the steps run in its precision.
        coefficients: a, b, c.
        steps: number of steps.
        eps: lower bound of the norm by which the matrix is divided first.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _rate(lr: float, rule: str | None, shape: torch.Size) -> float:
    """Scale the learning rate for a matrix by a rule of `torch.optim.Muon`."""
    rows, columns = shape[:2]
    if rule == "match_rms_adamw":
        return lr * 0.2 * max(rows, columns) ** 0.5
    ratio = rows / columns
    return lr * (ratio if rule == "spectral_unclamped" else max(1.0, ratio)) ** 0.5
