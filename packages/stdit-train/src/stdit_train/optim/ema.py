"""The exponential moving average (EMA) of the weights, which is validated, sampled from and exported."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """Averages the weights of a model in float32: average += (1 - decay) * (weights - average).

    Args:
        model: model to average.
        decay: share of the average that an update keeps.
        average: float32 model with the same weights to hold the average; needed for a sharded model, which cannot be
            deep-copied, and for one with frozen weights, which the average shares with it. [default: a copy]
    """

    def __init__(self, model: nn.Module, decay: float, average: nn.Module | None = None) -> None:
        self.decay = decay
        average = copy.deepcopy(model).float() if average is None else average
        self.model: Any = average.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of a model."""
        pairs = [
            (average, weight.to(torch.float32))
            for average, weight in zip(self.model.parameters(), model.parameters(), strict=True)
            if average is not weight
        ]
        averages, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)
