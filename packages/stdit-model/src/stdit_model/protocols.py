"""What this package needs of a pipeline's components, which are classes of diffusers and transformers."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable  # diffusers checks the components of a loaded pipeline
class VAE(Protocol):
    """A diffusers image VAE (AutoencoderKL) or video VAE."""

    @property
    def config(self) -> Any:
        """Sizes, strides and the statistics of the latents."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""

    def encode(self, x: Tensor) -> Any:
        """Encode frames [B, 3, H, W], or clips [B, 3, T, H, W] of a video VAE; the posterior is in `latent_dist`."""

    def decode(self, z: Tensor) -> Any:
        """Decode latents; the frames are in `sample`."""


@runtime_checkable
class Tokenizer(Protocol):
    """A transformers tokenizer."""

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token for unknown words."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenize a text or several."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of token ids."""


@runtime_checkable
class TextEncoder(Protocol):
    """A transformers T5EncoderModel, or a model with the same call."""

    @property
    def config(self) -> Any:
        """Sizes, of which `d_model` is the width of the states."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Encode tokens; the states [B, L, Dc] are in `last_hidden_state`."""


@runtime_checkable
class Scheduler(Protocol):
    """A diffusers scheduler."""

    @property
    def config(self) -> Any:
        """Its settings."""

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the sampling steps, from noise to data."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        """Choose the timesteps."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        """Take one sampling step; options are return_dict and, for ancestral samplers, generator."""
