"""Writes mp4 files.

C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.files import write_atomically
from stdit_data.transforms import to_uint8


def write_mp4(path: str | Path, video: Tensor, fps: float, *, crf: int = 17) -> None:
    """Writes a video as h264, yuv420p, BT.709, which every player opens.

    The file is written under another name beside `path` and renamed, so that `path` is never half a file.

    Args:
        path: where; its folder must exist.
        video: [C, T, H, W] in [-1, 1]; values outside are clamped. An odd height or width is padded by one row or
            column that repeats the last, since yuv420p has no odd sizes.
        fps: frames a second.
        crf: x264's quality, 0 (lossless) to 51.

    Raises:
        DataError: not three channels, no frames, or an impossible rate.
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise DataError(f"video of shape {tuple(video.shape)}: expected [3, T, H, W] with at least one frame")
    if not 0 < fps <= 1000:
        raise DataError(f"fps {fps}: expected a rate above 0 and up to 1000")
    pixels = rearrange(to_uint8(video), "c t h w -> t c h w")
    height, width = pixels.shape[-2:]
    if height % 2 or width % 2:
        pixels = F.pad(pixels.float(), (0, width % 2, 0, height % 2), mode="replicate").to(pixels.dtype)
    pictures = rearrange(pixels, "t c h w -> t h w c").contiguous().numpy()

    options = {"movflags": "faststart"}
    with write_atomically(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(65535))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without macroblock trees: their AVX-512 code writes one of several files for the same small frames.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.thread_count = 1  # what is written then depends on the frames alone
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture in pictures:
            # One thread: with more, FFmpeg's scaler now and then leaves wrong pixels.
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: str | Path, video: Tensor, fps: float) -> None:
    """An endless GIF: 256 colours a frame, and frame times in hundredths of a second, at least two.

    Args:
        path: where; its folder must exist.
        video: [C, T, H, W] in [-1, 1]; values outside are clamped.
        fps: frames a second; above 50 browsers slow a GIF down, so that is as far as it goes.

    Raises:
        DataError: not three channels, no frames, or an impossible rate.
    """
    pictures = [picture.quantize(256, dither=Image.Dither.NONE) for picture in _pictures(video, fps)]
    # Times add up to the video's: a frame of 1/8 s takes 12 and 13 hundredths in turns.
    ends = [round(100 * (i + 1) / min(fps, 50.0)) for i in range(len(pictures))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    with write_atomically(path) as partial:
        pictures[0].save(
            partial, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def write_webp(path: str | Path, video: Tensor, fps: float) -> None:
    """An endless lossless WebP; arguments and errors as `write_gif`, but to the millisecond."""
    pictures = _pictures(video, fps)
    ends = [round(1000 * (i + 1) / fps) for i in range(len(pictures))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with write_atomically(path) as partial:
        pictures[0].save(
            partial, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, lossless=True
        )


def write_frames(path: str | Path, video: Tensor) -> None:
    """A folder of lossless PNGs, 0000.png and so on; one that is there is replaced.

    Raises:
        DataError: not three channels or no frames.
    """
    pictures = _pictures(video)
    with write_atomically(path) as partial:
        partial.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(partial / f"{i:04d}.png")


def write_png(path: str | Path, video: Tensor) -> None:
    """The single frame of a video [C, 1, H, W] as a PNG.

    Raises:
        DataError: not three channels, or another number of frames.
    """
    pictures = _pictures(video)
    if len(pictures) != 1:
        raise DataError(f"{path}: a picture has one frame, not {len(pictures)}")
    with write_atomically(path) as partial:
        pictures[0].save(partial, "PNG")


def _pictures(video: Tensor, fps: float = 1.0) -> list[Image.Image]:
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise DataError(f"video of shape {tuple(video.shape)}: expected [3, T, H, W] with at least one frame")
    if not 0 < fps <= 1000:
        raise DataError(f"fps {fps}: expected a rate above 0 and up to 1000")
    return [Image.fromarray(frame) for frame in rearrange(to_uint8(video.cpu()), "c t h w -> t h w c").numpy()]
