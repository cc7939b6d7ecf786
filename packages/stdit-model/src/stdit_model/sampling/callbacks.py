"""What a caller's callback sees and changes between the steps of a pipeline, with the names of diffusers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stdit_model.sampling.denoise import Guidance

TENSORS = ("latents", "prompt_embeds")  # that a callback may ask for
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class CallState:
    """The state of the current call of a pipeline, with the names by which diffusers' callbacks and caches find it."""

    _guidance: Guidance
    _num_timesteps: int
    _current_timestep: float | None = None
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        """Guidance scale; 1 where guidance is off."""
        return self._guidance.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._guidance.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        """Change it from the next step on, as diffusers' callbacks do, which turn guidance off with 0."""
        self._guidance.guidance_scale = max(scale, 1.0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether steps are guided."""
        return self._guidance.guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps, over all windows."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the current evaluation of the model, 0 to 1000."""
        return self._current_timestep

    def _set_timestep(self, timestep: float) -> None:
        self._current_timestep = timestep

    @property
    def interrupt(self) -> bool:
        """Whether sampling ends after the current step; a callback may set `pipeline._interrupt = True`."""
        return self._interrupt


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
