"""What a caller's callback sees and changes between the steps of a pipeline, with the names of diffusers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TENSORS = ("latents", "prompt_embeds")  # that a callback may ask for
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass
class StepEnd:
    """After each step: the caller's callback, and the progress bar.

    Attributes:
        pipeline: which the callback gets.
        bar: of the progress.
        callback: the caller's, if there is one.
        tensor_inputs: names of the tensors that it gets.
        tensors: those of them that stay the same from step to step.
        step: of all windows.
    """

    pipeline: Any
    bar: Any
    callback: Callback | None
    tensor_inputs: Sequence[str]
    tensors: Mapping[str, Tensor]
    step: int = 0

    def __call__(self, t: Tensor, x: Tensor) -> tuple[Tensor, bool]:
        """Return the latents to continue with, and whether to stop here."""
        if self.callback is not None:
            tensors = {**self.tensors, "latents": x}
            given = {name: tensors[name] for name in self.tensor_inputs}
            x = (self.callback(self.pipeline, self.step, t, given) or {}).get("latents", x)
        self.step += 1
        self.bar.update()
        return x, self.pipeline.interrupt
