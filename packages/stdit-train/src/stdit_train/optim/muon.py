"""Muon for weights that may be sharded, and in float32 on a CPU, where products of small bfloat16 matrices are slow."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from stdit_train.optim.whole_matrices import map_whole_matrices


class Muon(torch.optim.Muon):
    """Momentum with orthogonalised updates of matrices (Jordan et al. 2024).

    Arguments and state are those of `torch.optim.Muon`, and so is the step but for rounding. The matrices of a model
    that is sharded are dealt out to the ranks that share them (see `stdit_train.optim.whole_matrices`); replicas of the
    weights each do the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients; return the result of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = _orthogonalised(weights, (self._average(weight, group) for weight in weights), group)
            for weight, update in zip(weights, updates, strict=True):
                own = _own(weight)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(update.to(own.dtype), alpha=-_rate(group["lr"], group["adjust_lr_fn"], weight.shape))
        return loss

    def _average(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Add the gradient of a weight to its momentum; return the update, this rank's rows of it."""
        assert weight.grad is not None
        momentum, state = group["momentum"], self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad, memory_format=torch.preserve_format)
        gradient = _own(weight.grad)
        average = _own(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        return update.to(torch.float32 if update.device.type == "cpu" else torch.bfloat16)


def _orthogonalised(weights: list[Tensor], updates: Iterable[Tensor], group: dict[str, Any]) -> Iterable[Tensor]:
    """Return this rank's rows of the orthogonalised updates, from its rows of the updates."""
    compute = partial(orthogonalised, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
    if not weights or not isinstance(weights[0], DTensor):
        return map(compute, updates)
    mesh, dimension = weights[0].device_mesh, weights[0].placements.index(Shard(0))
    if mesh.size(dimension) == 1:
        return map(compute, updates)
    return map_whole_matrices(compute, list(updates), [weight.shape for weight in weights], mesh.get_group(dimension))


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


def _own(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rate(lr: float, rule: str | None, shape: torch.Size) -> float:
    """Scale the learning rate for a matrix by a rule of `torch.optim.Muon`."""
    rows, columns = shape[:2]
    if rule == "match_rms_adamw":
        return lr * 0.2 * max(rows, columns) ** 0.5
    ratio = rows / columns
    return lr * (ratio if rule == "spectral_unclamped" else max(1.0, ratio)) ** 0.5
