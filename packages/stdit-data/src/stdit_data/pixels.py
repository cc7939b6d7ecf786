"""Pixels to and from [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape to float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(values: Tensor) -> Tensor:
    """Float values in [-1, 1] of any shape to uint8 on the CPU, rounded to the nearest; values outside are clamped."""
    return values.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
