"""Probe videos and images: codec, size, length and frame rate."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from io import SEEK_END
from typing import Concatenate, ParamSpec, TypeVar

from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from stdit_data.errors import ClipError, DataError, StoreError
from stdit_data.storage import files, urls
from stdit_data.transforms import check_shape
from stdit_data.video import color
from stdit_data.video.deinterlace import is_interlaced
from stdit_data.video.pictures import is_still, open_video, read_image

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Probe:
    """Metadata of a video or image file. Sizes are as displayed: upright, with square pixels."""

    codec: str
    width: int  # pixels
    height: int  # pixels
    frames: int  # shown by a full decode, from the index or by counting packets; 1 for an image
    fps: float  # average frames per second; 0 for an image
    duration: float  # seconds; 0 for an image
    pixel_format: str = ""
    hdr: bool = False
    streams: int = 1  # video streams in the file
    interlaced: bool = False


@contextmanager
def clip_errors(url: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises into a `ClipError` that names it.

    A `StoreError` stays one, and so does a fault of the disk: the file itself may be good.
    """
    try:
        yield
    except (ClipError, StoreError):
        raise
    except FileNotFoundError:
        raise ClipError(url, files.missing(url)) from None
    except UnidentifiedImageError:
        raise ClipError(url, "not an image that Pillow knows") from None
    except FFmpegError as error:
        raise ClipError(url, _known_damage(url) or f"FFmpeg: {error.strerror or error}") from None
    except (DataError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        if files.is_passing(url, error):
            raise
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClipError(url, " ".join(words.split()).removeprefix(f"{url}: ") or type(error).__name__) from None
    except (Image.DecompressionBombError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ClipError(url, str(error)) from None


def reads_clip(read: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Make a function that reads a clip raise `ClipError` for a bad file, and wait where its store or disk fails.

    Args:
        read: reads a file, whose path or URL is its first argument; may be called many times.
    """

    @wraps(read)
    def waiting(url: str, *args: P.args, **kwargs: P.kwargs) -> T:
        def attempt(left: int = 3) -> T:
            with clip_errors(url):
                try:
                    return read(url, *args, **kwargs)
                except FFmpegError as error:
                    if not left or not files.is_passing(url, error):
                        raise
                _read_whole(url)  # FFmpeg reports some damaged files as a fault of the disk: this tells which it is
                return attempt(left - 1)

        return files.patiently(url, attempt)

    return waiting


def _read_whole(url: str) -> None:
    with files.open_binary(url) as file:
        while file.read(1 << 20):
            pass


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


@reads_clip
def probe(url: str, *, stream: int | None = None) -> Probe:
    """Read a file's metadata and decode its first frame.

    Args:
        url: path or URL of a video or an image.
        stream: number of the video stream, from 0; without it FFmpeg's choice.

    Raises:
        ClipError: the file can't be opened or its first frame doesn't decode.
    """
    with files.open_media(url) as media:
        if is_still(url, media):
            picture = read_image(media)
            check_shape(*picture.shape[1:])
            return Probe(urls.suffix(url)[1:], picture.shape[2], picture.shape[1], frames=1, fps=0.0, duration=0.0)
        with open_video(url, media, stream) as video:
            total = video.count()
            frame = next((frame for _, frame in video.all_frames()), None)
            if frame is None:
                raise DataError("no frame decodes")
            check_shape(frame.height, frame.width, video.aspect)
            width, height = max(1, round(frame.width * video.aspect)), frame.height
            if color.is_rotated(frame):
                width, height = height, width
            rate, duration = float(video.rate), video.duration
            if abs(duration * rate - total) > max(2.0, 0.02 * total):  # a variable rate, declared by its fastest part
                rate = total / duration
            return Probe(
                codec=video.codec,
                width=width,
                height=height,
                frames=total,
                fps=rate,
                duration=duration,
                pixel_format=frame.format.name,
                hdr=color.is_hdr(frame),
                streams=video.streams,
                interlaced=is_interlaced(frame, video.codec),
            )
