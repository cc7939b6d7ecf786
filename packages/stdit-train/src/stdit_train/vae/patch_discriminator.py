"""The discriminator of patches (PatchGAN; Isola et al. 2017, section 3.2), of frames or of clips.

B batch, C channels, T frames, H W height and width.
"""

from typing import cast

import torch
from torch import Tensor, nn

GROUPS = 8  # of the norms; batch norm, as published, would make a sample's loss depend on the other samples


class PatchDiscriminator(nn.Module):
    """Tell true clips from reconstructed ones, patch by patch.

    Args:
        channels: width of the first layer, a multiple of 8; each further layer doubles it, up to 8 times.
        layers: layers that halve height and width, the first included.
        over_time: whether convolutions see neighbouring frames; otherwise each frame stands alone.
    """

    def __init__(self, channels: int = 64, layers: int = 3, over_time: bool = False) -> None:
        super().__init__()
        kernel, padding = (3 if over_time else 1, 4, 4), (1 if over_time else 0, 1, 1)
        parts: list[nn.Module] = [nn.Conv3d(3, channels, kernel, (1, 2, 2), padding), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            out, stride = channels * min(2**i, 8), (1, 2, 2) if i < layers else (1, 1, 1)
            parts += [nn.Conv3d(width, out, kernel, stride, padding, bias=False), _Norm(GROUPS, out), nn.LeakyReLU(0.2)]
            width = out
        self.layers = nn.Sequential(*parts, nn.Conv3d(width, 1, kernel, (1, 1, 1), padding))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit for each patch of clips [B, 3, T, H, W], [B, 1, T, h, w]; above zero means true."""
        return cast(Tensor, self.layers(x))


class _Norm(nn.GroupNorm):
    """Group normalisation of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)


def hinge(true_logits: Tensor, made_logits: Tensor) -> Tensor:
    """Return the discriminator's hinge loss [B] (Lim & Ye 2017)."""
    true = torch.relu(1.0 - true_logits.float()).flatten(1).mean(1)
    return 0.5 * (true + torch.relu(1.0 + made_logits.float()).flatten(1).mean(1))
