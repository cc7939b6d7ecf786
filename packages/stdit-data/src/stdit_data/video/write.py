"""Write videos as mp4, GIF, WebP or PNG, each file whole or not at all.
C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.storage.atomic import write_atomically
from stdit_data.storage.files import wrap_errors
from stdit_data.transforms import normalise, to_uint8

SUFFIXES = (".mp4", ".gif", ".webp", ".png")


Frames: TypeAlias = Tensor | np.ndarray | Sequence[Image.Image]


def export_video(frames: Frames, path: str | Path, fps: float = 8.0) -> Path:
    """Write one video in the format that the path's suffix names, as `export_to_video` of diffusers does.

    Args:
        frames: a tensor [3, T, H, W] in [-1, 1]; an array [T, H, W, 3], floating in [0, 1] or uint8; or PIL images of
            one size. Of `STDiTPipeline` that is `frames[0]` for each `output_type` but "latent".
        path: .mp4, .gif, .webp, or .png for a single frame; without a suffix, a folder of PNGs. Missing folders are
            made, an existing file is replaced.
        fps: frames per second when played; a checkpoint's own is `pipeline.config.fps`.

    Returns:
        The path.

    Raises:
        DataError: an unknown suffix, frames of another shape, several frames for a PNG, or a frame rate out of range.
        FileError: the file can't be written.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and suffix:
        raise DataError(f"{path}: expected {', '.join(SUFFIXES)}, or a name without a suffix for a folder of PNGs")
    video = _as_video(frames)
    _check(video, fps)
    with wrap_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".mp4":
        write_mp4(path, video, fps)
    elif suffix == ".gif":
        write_gif(path, video, fps)
    elif suffix == ".webp":
        write_webp(path, video, fps)
    elif suffix == ".png":
        write_png(path, video)
    else:
        write_frames(path, video)
    return path


def write_mp4(path: str | Path, video: Tensor, fps: float, *, crf: int = 17) -> None:
    """Write a video as H.264 in yuv420p and BT.709, which every player opens.

    Args:
        path: the file to write; its folder must exist.
        video: [3, T, H, W] in [-1, 1]; values outside are clamped. An odd height or width is padded by repeating the
            last row or column, since yuv420p needs even sizes.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51.

    Raises:
        DataError: not three channels, no frames, or a frame rate out of range.
        FileError: the file can't be written.
    """
    _check(video, fps)
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
        # Without macroblock trees, whose AVX-512 code is not deterministic for small frames.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.thread_count = 1  # the file then depends on the frames alone
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture in pictures:
            # With more threads FFmpeg's scaler occasionally leaves wrong pixels.
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: str | Path, video: Tensor, fps: float) -> None:
    """Write a looping GIF with 256 colours per frame and frame times in hundredths of a second.

    Args:
        path: the file to write; its folder must exist.
        video: [3, T, H, W] in [-1, 1]; values outside are clamped.
        fps: frames per second; limited to 50, above which browsers slow a GIF down.

    Raises:
        DataError: not three channels, no frames, or a frame rate out of range.
        FileError: the file can't be written.
    """
    pictures = [picture.quantize(256, dither=Image.Dither.NONE) for picture in _pictures(video, fps)]
    # Rounding errors don't add up: frames of 1/8 s last 12 and 13 hundredths in turn.
    ends = [round(100 * (i + 1) / min(fps, 50.0)) for i in range(len(pictures))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    with write_atomically(path) as partial:
        pictures[0].save(
            partial, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def write_webp(path: str | Path, video: Tensor, fps: float) -> None:
    """Write a looping lossless WebP with frame times in milliseconds; arguments and errors as in `write_gif`."""
    pictures = _pictures(video, fps)
    ends = [round(1000 * (i + 1) / fps) for i in range(len(pictures))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with write_atomically(path) as partial:
        pictures[0].save(
            partial, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, lossless=True
        )


def write_frames(path: str | Path, video: Tensor) -> None:
    """Write a folder of PNGs, 0000.png and so on; an existing folder is replaced.

    Args:
        path: the folder to write; its parent must exist.
        video: [3, T, H, W] in [-1, 1]; values outside are clamped.

    Raises:
        DataError: not three channels or no frames.
        FileError: the folder can't be written.
    """
    pictures = _pictures(video)
    with write_atomically(path) as partial:
        partial.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(partial / f"{i:04d}.png")


def write_png(path: str | Path, video: Tensor) -> None:
    """Write the single frame of a video [3, 1, H, W] in [-1, 1] as a PNG.

    Raises:
        DataError: not three channels, or not exactly one frame.
        FileError: the file can't be written.
    """
    pictures = _pictures(video)
    if len(pictures) != 1:
        raise DataError(f"{path}: an image has one frame, not {len(pictures)}")
    with write_atomically(path) as partial:
        pictures[0].save(partial, "PNG")


def _pictures(video: Tensor, fps: float = 1.0) -> list[Image.Image]:
    _check(video, fps)
    return [Image.fromarray(frame) for frame in rearrange(to_uint8(video), "c t h w -> t h w c").numpy()]


def _as_video(frames: Frames) -> Tensor:
    """Convert what `export_video` takes to [3, T, H, W] in [-1, 1]."""
    if isinstance(frames, Tensor):
        batch = frames.ndim == 5
        video = normalise(frames) if frames.dtype == torch.uint8 else frames
    else:
        pictures = [np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame) for frame in frames]
        if len({picture.shape for picture in pictures}) != 1:
            raise DataError("frames of several sizes" if pictures else "no frames to write")
        array = np.stack(pictures)
        batch = array.ndim == 5
        if not batch and (array.ndim != 4 or array.shape[-1] != 3):
            raise DataError(f"frames of shape {array.shape}: expected [T, H, W, 3]")
        pixels = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))
        video = pixels if batch else rearrange(normalise(pixels), "t h w c -> c t h w")
    if batch:
        raise DataError(f"{len(frames)} videos: write one at a time, e.g. export_video(frames[0], ...)")
    return video


def _check(video: Tensor, fps: float) -> None:
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise DataError(f"video of shape {tuple(video.shape)}: expected [3, T, H, W] with at least one frame")
    if not 0 < fps <= 1000:
        raise DataError(f"fps {fps}: expected a rate above 0 and up to 1000")
