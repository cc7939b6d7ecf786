"""Compute a perceptual hash, nearly the same for nearly the same picture."""

from __future__ import annotations

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from stdit_data.curation.sampling import Array, ClipFrames

COLUMNS = {"phash": pa.string()}  # of the middle frame: 256 bits, hexadecimal
SIDE = 16  # bits


def score(clip: ClipFrames) -> dict[str, str]:
    """Return the hash of the middle frame."""
    return {"phash": perceptual_hash(clip.grey[len(clip.grey) // 2]).hex()}


def perceptual_hash(grey: Array) -> bytes:
    """Hash a luma picture [H, W] to 32 bytes: the signs of its low DCT frequencies relative to their median."""
    return np.packbits(imagehash.phash(Image.fromarray(grey), hash_size=SIDE).hash).tobytes()
