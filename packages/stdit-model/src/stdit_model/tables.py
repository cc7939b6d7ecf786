"""Constant tables, computed in float64 on the host and kept on each device in each dtype.

A forward neither computes nor copies them again, and `torch.compile` does not trace them: under it, and on tensors
without contents, they come from a custom operator, which has the sizes alone as its arguments.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def device_table(
    name: str, make: Callable[..., np.ndarray], shape: Callable[..., tuple[int, ...]]
) -> Callable[..., Tensor]:
    """Return a function that returns a table on a device: (sizes, scale, device, dtype) -> Tensor, not to be changed.

    Args:
        name: of the table, and of its operator in `torch.ops.stdit_model`.
        make: computes it from its sizes and its scale.
        shape: its shape, from its sizes.
    """

    @lru_cache(maxsize=64)
    def table(sizes: tuple[int, ...], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # a table that is made while sampling may be used in training later
            return torch.from_numpy(make(*sizes, scale)).to(device, dtype)

    # The copy is the operator's own, since a compiler may reuse the memory of what an operator returns. CUDA graphs
    # leave the operator out: memory that is allocated while one is recorded must not outlive it.
    @torch.library.custom_op(f"stdit_model::{name}", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
    def operator(sizes: list[int], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        return table(tuple(sizes), scale, device, dtype).clone()

    @operator.register_fake
    def _(sizes: list[int], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape(*sizes), device=device, dtype=dtype)

    def look_up(sizes: tuple[int, ...], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return operator(list(sizes), scale, device, dtype)
        return table(sizes, scale, device, dtype)

    return look_up
