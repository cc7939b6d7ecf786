"""Classifier-free guidance (arXiv:2207.12598), its rescaling, and when it acts.

Legend: B videos, C channels, T frames, H W height and width.
"""

import torch
from torch import Tensor

from stdit_model.model import TextCache


def guide(output: Tensor, scale: float, channels: int, rescale: float = 0.0) -> Tensor:
    """Guidance on the first `channels` channels: [2B, C', T, H, W] -> [B, C', T, H, W].

    The first half of the batch is the prompts', the second the unconditional one. All other channels (variance) are
    the prompts'.

    Args:
        output: of the denoiser.
        scale: 1 leaves the prompts' half as it is.
        channels: how many are guided.
        rescale: from 0 to 1, how far each guided video's standard deviation is brought back to that of the prompts'
            half, against over-exposure at large scales (arXiv:2305.08891, section 3.4).
    """
    conditional, unconditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    if rescale:
        axes = tuple(range(1, output.ndim))
        wanted = conditional[:, :channels].std(axes, keepdim=True)
        factor = wanted / guided.std(axes, keepdim=True).clamp_min(1e-12)
        guided = guided * (rescale * factor + 1.0 - rescale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def acts(step: int, steps: int, interval: tuple[float, float]) -> bool:
    """Whether guidance acts in this step: the interval is a share of the steps, from 0 (all noise) to 1 (all done)."""
    return interval[0] * steps <= step < interval[1] * steps


def prompts_half(text: TextCache, batch: int) -> TextCache:
    """What the prompts alone were encoded to, of a cache that the unconditional half follows."""
    mask = text.mask_BL
    return TextCache(
        [(keys[:batch], values[:batch]) for keys, values in text.keys_values], None if mask is None else mask[:batch]
    )
