"""The arithmetic of a step: which precision the network runs in, and how its gradients come back in float32."""

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stdit_model import STDiT
from stdit_train.config.schema import PrecisionName

UNSTABLE = (
    "warning: float16 training of this model was found unstable (Open-Sora 1.0's report); the loss is scaled, and "
    "steps whose gradients overflow are skipped. --set precision=bf16 avoids it"
)


class Precision:
    """How a float32 model is run forward and backward. The optimiser, its average and checkpoints see float32 alone.

    fp32          as it is
    bf16          under autocast: matrix products in bfloat16
    bf16-weights  a bfloat16 copy of the weights is run; its gradients are added to the float32 masters' after each
                  micro-batch, and the copy follows the masters after each step
    fp16          under autocast in float16, the loss scaled so that small gradients don't vanish

    Args:
        model: the float32 masters.
        name: one of the above.
        device: of the model.
        sharded: its weights are gathered for each use, in bfloat16 for both kinds of bf16: no copy is needed.

    Attributes:
        module: what is to be called in training.
    """

    def __init__(self, model: STDiT, name: PrecisionName, device: torch.device, sharded: bool = False) -> None:
        self.masters, self.name, self.device = model, name, device
        copied = name == "bf16-weights" and not sharded
        self.module = copy.deepcopy(model).to(torch.bfloat16) if copied else model
        self._scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around every forward and its loss."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.float16 if self.name == "fp16" else torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to the masters'."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if self.module is self.masters:
            return
        for master, weight in zip(self.masters.parameters(), self.module.parameters(), strict=True):
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def unscale(self, optimizers: Iterable[Optimizer]) -> None:
        """Before gradients are looked at: take the loss scale out of them."""
        if self._scaler is not None:
            for optimizer in optimizers:
                self._scaler.unscale_(optimizer)

    @torch.no_grad()
    def finish_step(self, stepped: bool) -> None:
        """After the optimisers' step, or after it was skipped."""
        if self._scaler is not None:
            self._scaler.update()  # smaller where gradients overflowed
        if stepped and self.module is not self.masters:
            torch._foreach_copy_(list(self.module.parameters()), list(self.masters.parameters()))

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with; 1 but for fp16."""
        return self._scaler.get_scale() if self._scaler is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, with the masters as they are now."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)
        self.finish_loading()

    def finish_loading(self) -> None:
        """Let the copy follow masters that were changed from outside."""
        if self.module is not self.masters:
            self.module.load_state_dict(self.masters.state_dict())
