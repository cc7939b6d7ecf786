"""The exponential moving average of the weights: what is validated, sampled from and published."""

import copy

import torch

from stdit_model import STDiT


class Ema:
    """A float32 copy of a model that follows it: average += (1 - decay) * (weights - average).

    Args:
        model: followed.
        decay: share of the average that a step keeps.
        average: a float32 model that already equals it, to be used as the copy: a sharded model can't be deep-copied.
    """

    def __init__(self, model: STDiT, decay: float, average: STDiT | None = None) -> None:
        self.decay = decay
        average = copy.deepcopy(model).float() if average is None else average
        self.model = average.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: STDiT) -> None:
        """Move towards the model's weights."""
        average = list(self.model.parameters())
        weights = [parameter.to(torch.float32) for parameter in model.parameters()]
        torch._foreach_lerp_(average, weights, 1.0 - self.decay)
