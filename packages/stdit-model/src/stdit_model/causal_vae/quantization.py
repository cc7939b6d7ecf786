"""Finite scalar quantisation (FSQ; Mentzer et al. 2023, arXiv:2309.15505): each channel is rounded to a few levels.

A channel of L levels has the values k / (L // 2) for the L whole numbers k from -(L // 2). There is no codebook to
learn; the gradient passes the rounding as if it were not there.

C channels, one for each number of levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NO_VARIANCE = -30.0  # log variance of an encoder that is deterministic; least of diffusers' posteriors
CODE_DEVIATION = 0.5  # of latents that are to become codes: tanh hardly bounds them
MARGIN = 1e-3  # share by which tanh reaches beyond the outermost levels, as in the authors' code


def quantize(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Bound an encoder's output [B, C, ...] by tanh and round it to codes in [-1, 1] (section 3.1, appendix A.1)."""
    half = (_column(levels, z) - 1) * (1 + MARGIN) / 2
    offset = 0.5 * (_column(levels, z) % 2 == 0)  # an even number of levels has one more below zero than above
    bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
    return _through(bounded, bounded.round()) / _steps(levels, z)


def nearest_codes(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the codes [B, C, ...] that are nearest to some values; codes stay as they are."""
    steps, z = _steps(levels, z), z.float()
    return _through(z, torch.minimum(torch.maximum((z * steps).round(), -steps), _most(levels, z)) / steps)


def codes_to_indices(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the index of each code in the product of all levels: [B, C, ...] to [B, ...], from 0."""
    digits = (codes * _steps(levels, codes)).round().long() + _steps(levels, codes).long()
    return (digits * _bases(levels, codes)).sum(1)


def indices_to_codes(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the codes of indices: [B, ...] to [B, C, ...]."""
    spread = indices[:, None]
    digits = spread // _bases(levels, spread) % _column(levels, spread).long()
    return (digits - _steps(levels, spread).long()) / _steps(levels, spread)


def code_bits(levels: Sequence[int]) -> float:
    """Return the bits of a code."""
    return math.log2(math.prod(levels))


def _column(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(1, -1, *[1] * (like.ndim - 2))


def _steps(levels: Sequence[int], like: Tensor) -> Tensor:
    return _column([number // 2 for number in levels], like)


def _most(levels: Sequence[int], like: Tensor) -> Tensor:
    return _column([(number - 1) // 2 for number in levels], like)


def _bases(levels: Sequence[int], like: Tensor) -> Tensor:
    return _column([math.prod(levels[:i]) for i in range(len(levels))], like).long()


def _through(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the gradient of x."""
    return y.detach() + (x - x.detach())
