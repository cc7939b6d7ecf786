"""Convert decoded frames to RGB: matrix, range, orientation, and HDR to SDR.

H height, W width.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from einops import einsum
from torch import Tensor

# FFmpeg's AVColorSpace to the matrices its scaler knows (4 FCC, 7 SMPTE 240M, 10 is constant-luminance BT.2020).
MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
HD_HEIGHT = 720  # untagged video is read as BT.709 from this height on, as BT.601 below, as players do
PQ, HLG = 16, 18  # AVColorTransferCharacteristic of HDR: SMPTE ST 2084 and ARIB STD-B67
# The scaler's fast path is darker by 1 to 2 of 255 levels; the last two flags avoid it.
QUALITY = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

SDR_WHITE = 203.0  # nits that HDR video gives to diffuse white, ITU-R BT.2408
HDR_PEAK = 1000.0  # nits that the brightest highlights are taken to have
KNEE = 0.5  # below this share of SDR white tones stay as they are
# Linear BT.2020 to BT.709, ITU-R BT.2087, M2.
BT2020_TO_709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))


def is_hdr(frame: Any) -> bool:
    """Return whether an `av.VideoFrame` is coded as HDR, PQ or HLG."""
    return frame.color_trc in (PQ, HLG)


def is_rotated(frame: Any) -> bool:
    """Return whether an `av.VideoFrame` swaps height and width when it is turned upright."""
    matrix = _display_matrix(frame)
    return matrix is not None and abs(matrix[1]) > abs(matrix[0])


def to_rgb(frame: Any, reformatter: VideoReformatter, *, alpha: bool = True) -> Tensor:
    """Convert a frame to upright RGB, as a player shows it on a white page.

    Args:
        frame: a decoded `av.VideoFrame`.
        reformatter: reused for all frames of a file, since setting one up costs more than using it.
        alpha: lay transparent frames on white; without it their alpha channel is ignored.

    Returns:
        [3, H, W] (a view, channels last in memory): uint8, or for HDR float32 in [0, 1], still PQ- or HLG-coded, to be
        resized first and then passed to `tone_map`.
    """
    hdr = is_hdr(frame)
    name = frame.format.name
    yuv = name.startswith(("yuv", "nv", "p0", "p2", "p4", "y2"))
    if name.startswith("yuvj"):
        source_range = ColorRange.JPEG
    elif frame.color_range in (ColorRange.MPEG, ColorRange.JPEG):
        source_range = ColorRange(frame.color_range)
    else:
        source_range = ColorRange.MPEG if yuv else ColorRange.UNSPECIFIED
    guess = Colorspace.ITU709 if min(frame.height, frame.width) >= HD_HEIGHT else Colorspace.ITU601
    converted = reformatter.reformat(
        frame,
        format="rgb48le" if hdr else "rgb24",
        src_colorspace=MATRICES.get(frame.colorspace, guess) if yuv else None,
        src_color_range=source_range,
        dst_color_range=ColorRange.JPEG,
        interpolation=QUALITY,
        threads=1,  # with more, FFmpeg's scaler occasionally leaves wrong pixels
    )
    pixels = converted.to_ndarray()
    if name.startswith(("gray", "ya")) and source_range == ColorRange.MPEG:
        pixels = _expand(pixels)
    if alpha and _has_alpha(frame):
        pixels = _on_white(pixels, frame)
    picture = torch.from_numpy(_upright(pixels, frame)).permute(2, 0, 1)
    return picture.to(torch.float32).div_(65535) if hdr else picture


def tone_map(coded: Tensor, transfer: int) -> Tensor:
    """Map HDR to SDR: coded BT.2020 light to BT.709.

    Diffuse white (203 nits, ITU-R BT.2408) becomes SDR white. Tones up to half of it are kept; those above, up to
    1000 nits, are compressed by a Moebius curve of the brightest channel, which keeps hues (FFmpeg's `tonemap=mobius`).

    Args:
        coded: [3, H, W] in [0, 1], PQ (SMPTE ST 2084) or HLG (ITU-R BT.2100) coded.
        transfer: `PQ` or `HLG`.

    Returns:
        [3, H, W] in [0, 1], coded for ITU-R BT.1886 (gamma 2.4).
    """
    nits = _pq_to_nits(coded) if transfer == PQ else _hlg_to_nits(coded)
    light = nits / SDR_WHITE
    peak = HDR_PEAK / SDR_WHITE
    brightest = light.amax(0, keepdim=True).clamp_(min=1e-6)
    a = -(KNEE**2) * (peak - 1) / (KNEE**2 - 2 * KNEE + peak)
    b = (KNEE**2 - 2 * KNEE * peak + peak) / (peak - 1)
    curve = (b**2 + 2 * b * KNEE + KNEE**2) / (b - a) * (brightest + a) / (brightest + b)
    light = light * torch.where(brightest > KNEE, curve / brightest, 1.0)
    light = einsum(light.new_tensor(BT2020_TO_709), light, "rgb wide, wide h w -> rgb h w")
    return light.clamp_(0, 1).pow_(1 / 2.4)


def _pq_to_nits(coded: Tensor) -> Tensor:
    """SMPTE ST 2084's EOTF."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = coded.clamp(0, 1).pow(1 / m2)
    return 10000 * ((power - c1).clamp_(min=0) / (c2 - c3 * power)).pow(1 / m1)


def _hlg_to_nits(coded: Tensor) -> Tensor:
    """ITU-R BT.2100: the inverse OETF, then the OOTF of a display of 1000 nits (gamma 1.2)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    coded = coded.clamp(0, 1)
    scene = torch.where(coded <= 0.5, coded.square() / 3, (((coded - c) / a).exp() + b) / 12)
    luminance = einsum(scene.new_tensor((0.2627, 0.6780, 0.0593)), scene, "rgb, rgb h w -> h w")
    return HDR_PEAK * luminance.clamp_(min=1e-9).pow(0.2) * scene


def _expand(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Expand limited-range grey, 16 to 235 of 8 bits, which FFmpeg's scaler takes for full range."""
    top = np.iinfo(pixels.dtype).max
    full = (pixels.astype(np.float32) * (255 / top) - 16) * (top / 219)
    return np.asarray(full.round().clip(0, top), pixels.dtype)


def _has_alpha(frame: Any) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _on_white(pixels: np.ndarray[Any, Any], frame: Any) -> np.ndarray[Any, Any]:
    """Lay [H, W, 3] pixels on white by the frame's alpha channel, which is not premultiplied."""
    share = frame.to_ndarray(format="rgba", threads=1)[..., 3:]
    if (share == 255).all():
        return pixels
    top = np.iinfo(pixels.dtype).max
    laid = top + (pixels.astype(np.float32) - top) * (share.astype(np.float32) / 255)
    return np.asarray(laid.round(), pixels.dtype)


def _upright(pixels: np.ndarray[Any, Any], frame: Any) -> np.ndarray[Any, Any]:
    """Rotate and mirror [H, W, 3] as the file's display matrix says (multiples of 90 degrees)."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(b) > abs(a):  # x and y are swapped: x' = c y, y' = b x
        pixels = pixels.transpose(1, 0, 2)
        across, down = c < 0, b < 0
    else:
        across, down = a < 0, d < 0
    if across:
        pixels = pixels[:, ::-1]
    if down:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of x' = a x + c y, y' = b x + d y."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            return a, b, c, d
    return None
