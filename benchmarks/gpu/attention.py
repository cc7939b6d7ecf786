"""Attention kernels of torch at the shapes of XL/2, head width 72 as it is and padded to 80."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.gpu.setup import TEXT_TOKENS, Case, Setup, Values
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TITLE = "Attention of XL/2 in bf16, forward and backward, ms (TFLOP/s): 16x512, 2 clips"
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "two products": SDPBackend.MATH,
}
HEADS, WIDTH, PADDED = 16, 72, 80


def cases(setup: Setup) -> list[Case]:
    frames, height, width = setup.latents["16x512"]
    positions, clips = height * width // 4, 2
    shapes = {  # batch, queries, keys, with a mask or not
        "spatial": (clips * frames, positions, positions, False),
        "temporal": (clips * positions, frames, frames, False),
        "cross": (clips, frames * positions, TEXT_TOKENS, True),
    }
    return [
        Case(f"{name}, head width {head}", partial(measure, setup, shape, head))
        for name, shape in shapes.items()
        for head in (WIDTH, PADDED)
    ]


def measure(setup: Setup, shape: tuple[int, int, int, bool], head: int) -> Values:
    batch, queries, keys, masked = shape
    q, k, v = (
        torch.randn(batch, length, HEADS, WIDTH, device=setup.device, dtype=torch.bfloat16).transpose(1, 2)
        for length in (queries, keys, keys)
    )
    mask = torch.rand(batch, 1, 1, keys, device=setup.device) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    work = 4 * batch * HEADS * queries * keys * WIDTH
    columns: Values = {"batch": batch, "queries": queries, "keys": keys}
    for name, backend in BACKENDS.items():
        columns[name] = timed_backend(setup, attention(backend, head), (q, k, v, mask), work)
    return columns


def attention(backend: SDPBackend | None, head: int) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Return the attention, with queries, keys and values padded with zeros to a head width, if that is larger."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        width = q.shape[-1]
        if head > width:
            q, k, v = (F.pad(x, (0, head - width)) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=width**-0.5)[..., :width]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=width**-0.5)[..., :width]

    return call


def timed_backend(setup: Setup, call: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], work: float) -> str:
    *tensors, mask = inputs
    tensors = [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]

    def both() -> None:
        call(*tensors, mask).sum().backward()

    try:
        with torch.no_grad():
            forward = setup.timed(lambda: call(*tensors, mask))
        total = setup.timed(both)
    except RuntimeError as error:  # NotImplementedError is one
        return "out of memory" if isinstance(error, torch.OutOfMemoryError) else "refused"
    rates = (work / forward / 1e12, 3.5 * work / total / 1e12)  # the backward computes the scores once more
    return f"{1e3 * forward:.2f} ({rates[0]:.3g}), {1e3 * total:.2f} ({rates[1]:.3g})"
