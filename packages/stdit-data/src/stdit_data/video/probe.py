"""Probe videos and images: codec, size, length and frame rate."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import SEEK_END
from typing import IO

import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stdit_data import files
from stdit_data.errors import ClipError, DataError
from stdit_data.video import color
from stdit_data.video.deinterlace import is_interlaced
from stdit_data.video.stream import VideoStream


@dataclass(frozen=True, slots=True)
class Probe:
    """Metadata of a video or image file. Sizes are as displayed: upright, with square pixels."""

    codec: str
    width: int  # pixels
    height: int  # pixels
    frames: int  # as declared, else computed from duration and rate, else counted; 1 for an image
    fps: float  # average frames per second; 0 for an image
    duration: float  # seconds; 0 for an image
    pixel_format: str = ""
    hdr: bool = False
    streams: int = 1  # video streams in the file
    interlaced: bool = False


@contextmanager
def clip_errors(url: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises into a `ClipError` that names it."""
    try:
        yield
    except ClipError:
        raise
    except FileNotFoundError:
        raise ClipError(url, files.missing(url)) from None
    except UnidentifiedImageError:
        raise ClipError(url, "not an image that Pillow knows") from None
    except FFmpegError as error:
        raise ClipError(url, _known_damage(url) or f"FFmpeg: {error.strerror or error}") from None
    except (DataError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClipError(url, " ".join(words.split()).removeprefix(f"{url}: ") or type(error).__name__) from None
    except (Image.DecompressionBombError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ClipError(url, str(error)) from None


def _known_damage(url: str) -> str | None:
    """Explain what FFmpeg calls invalid data, for an empty file and an mp4 without an index."""
    with suppress(DataError, OSError), files.open_binary(url) as file:
        total = file.seek(0, SEEK_END)
        if total == 0:
            return "the file is empty"
        at, kinds = 0, set[bytes]()
        while at + 8 <= total and len(kinds) < 16:  # an mp4's outermost boxes: size, then kind
            file.seek(at)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1 and at + 16 <= total:  # a 64-bit size follows
                (size,) = struct.unpack(">Q", file.read(8))
            kinds.add(kind)
            if size < 8:
                break
            at += size
        if b"ftyp" in kinds and not kinds & {b"moov", b"moof"}:
            return "truncated: the index at the end of the mp4 is missing"
    return None


def probe(url: str, *, stream: int | None = None) -> Probe:
    """Read a file's metadata and decode its first frame.

    Args:
        url: path or URL of a video or an image.
        stream: number of the video stream, from 0; without it FFmpeg's choice.

    Raises:
        ClipError: the file can't be opened or its first frame doesn't decode.
    """
    with clip_errors(url), files.open_media(url) as media:
        if files.is_image(url):
            picture = read_image(media)
            return Probe(files.suffix(url)[1:], picture.shape[2], picture.shape[1], frames=1, fps=0.0, duration=0.0)
        with VideoStream(media, stream) as video:
            total = video.count()
            frame = next((frame for _, frame in video.all_frames()), None)
            if frame is None:
                raise DataError("no frame decodes")
            width, height = round(frame.width * video.aspect), frame.height
            if color.is_rotated(frame):
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
                interlaced=is_interlaced(frame, video.video.codec_context.name),
            )


def read_image(media: str | IO[bytes]) -> Tensor:
    """Read an image upright by its EXIF tag, on white where it is transparent; of an animation the first frame.

    Args:
        media: path or open binary file.

    Returns:
        [3, H, W] uint8.
    """
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
