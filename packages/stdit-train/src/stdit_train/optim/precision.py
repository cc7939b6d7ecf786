"""The precision of forward and backward, with weights and gradients in float32 for the optimizer."""

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stdit_train.config.schema import PrecisionName

UNSTABLE = (
    "warning: float16 training of this model was found unstable (Open-Sora 1.0's report); the loss is scaled, and "
    "steps whose gradients overflow are skipped. --set precision=bf16 avoids it"
)


class Precision:
    """Runs a float32 model in another precision. The optimizer, the average and checkpoints use float32 only.

    fp32          in float32
    bf16          under autocast: matrix products in bfloat16
    bf16-weights  a bfloat16 copy of the weights is used; its gradients are added to those of the float32 masters after
                  each micro-batch, and the masters are copied to it after each step
    fp16          under autocast in float16, with the loss scaled so that small gradients do not vanish

    Args:
        model: the float32 masters.
        name: one of the above.
        device: device of the model.
        sharded: whether weights are gathered for each use, in bfloat16 for both kinds of bf16, so that no copy is
            needed.

    Attributes:
        module: the model to call in training.
    """

    def __init__(self, model: nn.Module, name: PrecisionName, device: torch.device, sharded: bool = False) -> None:
        self.masters, self.name, self.device = model, name, device
        copied = name == "bf16-weights" and not sharded
        self.module: Any = copy.deepcopy(model).to(torch.bfloat16) if copied else model
        self._scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a forward and its loss."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.float16 if self.name == "fp16" else torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch to those of the masters."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if self.module is self.masters:
            return
        for master, weight in zip(self.masters.parameters(), self.module.parameters(), strict=True):
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def unscale(self, optimizers: Iterable[Optimizer]) -> None:
        """Divide the gradients by the loss scale, before they are clipped."""
        if self._scaler is not None:
            for optimizer in optimizers:
                self._scaler.unscale_(optimizer)

    @torch.no_grad()
    def finish_step(self, stepped: bool) -> None:
        """Update the loss scale and the bfloat16 copy, after the optimizers stepped or the step was skipped."""
        if self._scaler is not None:
            self._scaler.update()  # smaller where gradients overflowed
        if stepped and self.module is not self.masters:
            torch._foreach_copy_(list(self.module.parameters()), list(self.masters.parameters()))

    @property
    def loss_scale(self) -> float:
        """Factor of the loss in the backward; 1 except for fp16."""
        return self._scaler.get_scale() if self._scaler is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scale as plain values."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, and copy the masters as they are now."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)
        self.finish_loading()

    def finish_loading(self) -> None:
        """Update the copy after the masters were loaded."""
        if self.module is not self.masters:
            self.module.load_state_dict(self.masters.state_dict())
