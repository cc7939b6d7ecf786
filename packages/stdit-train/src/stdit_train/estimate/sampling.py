"""Estimate the memory of sampling at its peak, phase by phase: encode the text, denoise, decode.

The modules run on fake tensors, which have shapes and no memory, while the bytes that they would have allocated are
added up. Attention counts as fused kernels, which keep no scores.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdit_model.causal_vae.video_autoencoder import vae_class
from stdit_model.video_vae import is_temporal
from stdit_train.components.sizes import CLASS, SD_VAE, T5_XXL, component_config, vae_channels, vae_frames, vae_stride
from stdit_train.config.schema import TrainConfig, model_arguments


@dataclass(frozen=True)
class Phase:
    """Bytes that one phase of sampling holds."""

    name: str
    weights: int
    working: int  # the most that is allocated at once besides the weights, inputs and results included

    @property
    def total(self) -> int:
        """Weights and working memory."""
        return self.weights + self.working


def sampling_phases(
    model: dict[str, Any],
    shape: Sequence[int],
    *,
    itemsize: int = 2,
    text_8bit: bool = False,
    decode_frames: int = 1,
    text_encoder: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> list[Phase]:
    """Return the phases of `stdit sample --low-memory`, whose largest is the peak; without it the weights add up.

    Args:
        model: STDiT's constructor arguments.
        shape: of the latents, [B, C, T, H, W]; guidance doubles the batch.
        itemsize: bytes of a weight and an activation, 2 or 4.
        text_8bit: whether the text encoder's weights have one byte each.
        decode_frames: frames that an image VAE decodes at once.
        text_encoder, vae: configurations (see `components.sizes`). [default: Open-Sora 1.0's]
    """
    from transformers import T5Config, T5EncoderModel

    from stdit_model import STDiT

    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    batch, channels, frames, height, width = shape

    def empty(*extent: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(extent, dtype=kind)

    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        encoder = T5EncoderModel(T5Config(**(text_encoder or T5_XXL.values))).eval()
        transformer = STDiT(**model)
        values = vae or SD_VAE.values
        decoder = vae_class(str(values.get(CLASS))).from_config(values)
        length = transformer.config.model_max_length
        tokens = empty(1, length, kind=torch.int64)  # texts are encoded one by one
        states = empty(2 * batch, length, transformer.config.caption_channels)
        text = transformer.encode_text(states, empty(2 * batch, length, kind=torch.int64))

        def denoise() -> Any:
            x = empty(batch, *shape[1:], kind=torch.float32)
            halves = torch.cat([x, x]).to(dtype)
            return x, transformer(halves, empty(2 * batch, kind=torch.float32), text).float()

        def decode() -> Any:
            latents = empty(batch, *shape[1:], kind=torch.float32)
            if is_temporal(decoder):
                video = decoder.decode(latents.to(dtype)).sample
                return latents, video, video.float()
            part = decoder.decode(empty(decode_frames, channels, height, width)).sample
            stride = part.shape[-1] // width
            video = empty(batch, 3, frames, height * stride, width * stride)
            return latents, part, video, video.float()

        cache = 2 * transformer.config.depth * states.shape[0] * length * transformer.config.hidden_size * itemsize
        return [
            Phase(
                "text encoder",
                _bytes(encoder) // (itemsize if text_8bit else 1),
                peak(lambda: encoder(input_ids=tokens)),
            ),
            Phase("transformer", _bytes(transformer), cache + peak(denoise)),
            Phase("VAE", _bytes(decoder.decoder) + _bytes(decoder.encoder), peak(decode)),
        ]


def plan_sampling(config: TrainConfig) -> list[Phase]:
    """Return the phases of sampling one clip of a stage's size, with its VAE and text encoder.

    Components that are not on this machine count as Open-Sora 1.0's.
    """
    vae = component_config(config.data.vae, "vae").values
    text_encoder = component_config(config.data.text_encoder, "text_encoder").values
    channels, stride, data = vae_channels(vae), vae_stride(vae), config.data
    return sampling_phases(
        model_arguments(config, channels, text_encoder["d_model"]),
        (1, channels, vae_frames(vae, data.frames), data.height // stride, data.width // stride),
        text_encoder=text_encoder,
        vae=vae,
    )


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that a function has allocated at any one time, the tensors that it makes."""
    with torch.no_grad(), _Live() as live, _FusedAttention():
        run()
    return live.most


def describe_phases(phases: Sequence[Phase], available: int) -> list[str]:
    """Return the phases in lines for people."""
    gigabytes = [f"{phase.name} {phase.weights / 1e9:.1f} + {phase.working / 1e9:.2f}" for phase in phases]
    most = max(phase.total for phase in phases)
    fits = "fits" if most <= available else "does not fit"
    return [
        f"sampling     one clip, guided, in bf16 with --low-memory: {most / 1e9:.1f} GB at the peak, which {fits}; "
        f"weights + working memory in GB: {', '.join(gigabytes)}"
    ]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id_of(tensor) not in inputs | self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, name = tensor.untyped_storage(), id_of(tensor)
        size = storage.nbytes()
        self._known.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def id_of(tensor: Tensor) -> int:
    """Return the identity of the storage that a tensor is a view of."""
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """Replaces attention with an allocation of its output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, value = args[0], args[2] if len(args) > 2 else (kwargs or {})["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
