"""What a video or an image says of itself."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stdit_data import color, files
from stdit_data.errors import ClipError, DataError
from stdit_data.stream import VideoStream


@dataclass(frozen=True, slots=True)
class Probe:
    """A file's facts. Sizes are as shown: upright, with square pixels."""

    codec: str
    width: int  # pixels
    height: int  # pixels
    frames: int  # as declared, else reckoned from duration and rate, else counted; 1 for an image
    fps: float  # on average; 0 for an image
    duration: float  # seconds; 0 for an image
    pixel_format: str = ""
    hdr: bool = False
    streams: int = 1  # video streams in the file


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Turns whatever a broken or missing file raises into a `ClipError` that names it."""
    try:
        yield
    except ClipError:
        raise
    except FileNotFoundError:
        raise ClipError(url, "no such file") from None
    except UnidentifiedImageError:
        raise ClipError(url, "not an image that Pillow knows") from None
    except FFmpegError as error:
        raise ClipError(url, f"FFmpeg: {error.strerror or error}") from None
    except (DataError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise ClipError(url, " ".join(str(error).split()) or type(error).__name__) from None
    except (Image.DecompressionBombError, SyntaxError) as error:  # Pillow's word for a broken PNG
        raise ClipError(url, str(error)) from None


def probe(url: str, *, stream: int | None = None) -> Probe:
    """Opens a file and decodes one frame.

    Args:
        url: path or URL of a video or an image.
        stream: which video stream; the best without it.

    Raises:
        ClipError: it can't be opened or its first frame doesn't decode.
    """
    with reading(url), files.open_media(url) as media:
        if files.is_image(url):
            picture = read_image(media)
            return Probe(files.suffix(url)[1:], picture.shape[2], picture.shape[1], frames=1, fps=0.0, duration=0.0)
        with VideoStream(media, stream) as video:
            total = video.count()
            frame = next((frame for _, frame in video.all_frames()), None)
            if frame is None:
                raise DataError("no frame decodes")
            width, height = round(frame.width * video.aspect), frame.height
            if color.turned(frame):
                width, height = height, width
            duration = video.duration
            return Probe(
                codec=video.video.codec_context.name,
                width=width,
                height=height,
                frames=total,
                fps=float(video.rate),
                duration=float(total / video.rate) if duration is None else duration,
                pixel_format=frame.format.name,
                hdr=color.is_hdr(frame),
                streams=len(video.container.streams.video),
            )


def read_image(media: str | IO[bytes]) -> Tensor:
    """[3, H, W] uint8: upright by its EXIF tag, transparency laid on white. The first frame of an animation."""
    with Image.open(media) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
            grey = np.asarray(upright, dtype=np.float32)
            top = 65535 if upright.mode != "F" else max(1.0, float(grey.max()))
            upright = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
        if upright.has_transparency_data:
            paper = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(paper, upright.convert("RGBA"))
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
