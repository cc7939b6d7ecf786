"""Between PIL images or numpy arrays and the pixels of a pipeline.

Legend: B videos, T frames, K first frames, H W height and width.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from stdit_model.errors import SettingsError

Frames: TypeAlias = Tensor | Image.Image | Sequence[Image.Image]


def from_pil(images: Image.Image | Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Convert a PIL image, or several, to pixels [3, K, H, W] in [-1, 1].

    Images are turned upright by their EXIF tag, put on white where they are transparent, scaled to cover the size, and
    centre-cropped.

    Raises:
        SettingsError: no images, or something else.
    """
    frames = [images] if isinstance(images, Image.Image) else list(images)
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise SettingsError("first_frames: expected a tensor [3, K, H, W], a PIL image or a list of PIL images")
    pixels = np.stack([np.asarray(_fitted(frame, height, width)) for frame in frames])
    return rearrange(torch.from_numpy(pixels), "k h w c -> c k h w") / 127.5 - 1.0


def to_output(output_type: str, video: Tensor) -> Any:
    """Convert a video [B, 3, T, H, W] in [-1, 1] to `output_type`, see `STDiTPipeline.__call__`."""
    if output_type == "pt":
        return video
    array = rearrange(video / 2 + 0.5, "b c t h w -> b t h w c").cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype("uint8")]


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    rgb = upright.convert("RGB")
    if rgb.size == (width, height):
        return rgb
    return ImageOps.fit(rgb, (width, height), Image.Resampling.BICUBIC)
