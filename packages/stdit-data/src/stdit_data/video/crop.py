"""Find the crop that a file asks players to apply: Matroska's PixelCrop and the clean aperture of mp4 and mov.

FFmpeg reads both and leaves applying them to the player; PyAV does not hand them out. Crops inside the bitstream
(H.264, HEVC) are applied by the decoder and are not looked for here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, NamedTuple

SEGMENT, TRACKS, TRACK, TRACK_TYPE, VIDEO, CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0, 0x1F43B675
SEEK_HEAD, SEEK, SEEK_ID, SEEK_POSITION = 0x114D9B74, 0x4DBB, 0x53AB, 0x53AC
PIXEL_CROP = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}
VIDEO_TRACK = 1
LONGEST_NUMBER = 8  # bytes
SAMPLE_ENTRY = 86  # bytes of a VisualSampleEntry before its boxes


class Crop(NamedTuple):
    """Pixels cut off each side of the stored frame."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def filter(self, width: int, height: int) -> tuple[str, str] | None:
        """Return FFmpeg's filter for stored frames of `width` x `height`; None if nothing is cut, or nothing left."""
        across, down = width - self.left - self.right, height - self.top - self.bottom
        if not any(self) or min(across, down) < 1:
            return None
        return "crop", f"{across}:{down}:{self.left}:{self.top}:exact=1"


NO_CROP = Crop()


def find_crop(media: str | IO[bytes], number: int, format_name: str) -> Crop:
    """Read the crop of the `number`-th video track from a file's header.

    Args:
        media: path, or a seekable binary file.
        number: of the video track, from 0, cover pictures not counted.
        format_name: FFmpeg's name of the container.
    """
    find = _matroska if "matroska" in format_name else _mp4 if "mp4" in format_name else None
    if find is None:
        return NO_CROP
    try:
        with Path(media).open("rb") if isinstance(media, str) else nullcontext(media) as file:
            crops = find(file, file.seek(0, 2))
    except (struct.error, IndexError, ValueError, ZeroDivisionError):
        return NO_CROP  # damaged; FFmpeg has opened it all the same
    return crops[number] if number < len(crops) else NO_CROP


def _matroska(file: IO[bytes], end: int) -> list[Crop]:
    segment = next((e for e in _elements(file, 0, end) if e[0] == SEGMENT), None)
    if segment is None:
        return []
    tracks = _find_tracks(file, *segment[1:])
    found = [e for e in _elements(file, *tracks) if e[0] == TRACK] if tracks else []
    return [crop for track in found if (crop := _matroska_track(file, *track[1:])) is not None]


def _find_tracks(file: IO[bytes], at: int, stop: int) -> tuple[int, int] | None:
    """Find the description of the tracks: before the media, or where the table of contents says (edited files)."""
    for kind, low, high in _elements(file, at, stop):
        if kind == TRACKS:
            return low, high
        if kind == SEEK_HEAD:
            for entry, seek_low, seek_high in list(_elements(file, low, high)):
                if entry != SEEK:  # a checksum
                    continue
                seek = {e: _number(file, *span) for e, *span in list(_elements(file, seek_low, seek_high))}
                if seek.get(SEEK_ID) == TRACKS:
                    found = next(_elements(file, at + seek.get(SEEK_POSITION, 0), stop), None)
                    return found[1:] if found and found[0] == TRACKS else None
        if kind == CLUSTER:
            return None
    return None


def _matroska_track(file: IO[bytes], at: int, stop: int) -> Crop | None:
    """The crop of a video track; None for another kind of track."""
    kind, sides = 0, dict[str, int]()
    for element, low, high in list(_elements(file, at, stop)):
        if element == TRACK_TYPE:
            kind = _number(file, low, high)
        elif element == VIDEO:
            inside = list(_elements(file, low, high))
            sides = {PIXEL_CROP[e]: _number(file, start, end) for e, start, end in inside if e in PIXEL_CROP}
    return Crop(**sides) if kind == VIDEO_TRACK else None


def _elements(file: IO[bytes], at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """EBML elements (RFC 8794) as (id, start of the content, its end)."""
    while at < stop:
        file.seek(at)
        head = file.read(12)
        id_bytes = 9 - head[0].bit_length()
        size_bytes = 9 - head[id_bytes].bit_length()
        kind = int.from_bytes(head[:id_bytes])
        size = int.from_bytes(head[id_bytes : id_bytes + size_bytes]) & ((1 << 7 * size_bytes) - 1)
        at += id_bytes + size_bytes
        unknown = size == (1 << 7 * size_bytes) - 1  # a live recording: up to the end
        yield kind, at, stop if unknown else min(stop, at + size)
        at = stop if unknown else at + size


def _number(file: IO[bytes], at: int, stop: int) -> int:
    file.seek(at)
    return int.from_bytes(file.read(min(stop - at, LONGEST_NUMBER)))


def _mp4(file: IO[bytes], end: int) -> list[Crop]:
    crops = []
    for kind, at, stop in boxes(file, *_find_box(file, (b"moov",), 0, end)):
        if kind != b"trak":
            continue
        file.seek(_find_box(file, (b"mdia", b"hdlr"), at, stop)[0] + 8)
        if file.read(4) == b"vide":
            crops.append(_clean_aperture(file, *_find_box(file, (b"mdia", b"minf", b"stbl", b"stsd"), at, stop)))
    return crops


def _clean_aperture(file: IO[bytes], at: int, stop: int) -> Crop:
    """The `clap` box (ISO/IEC 14496-12, 12.1.4) of a track's first sample description."""
    file.seek(at + 8)
    (size,) = struct.unpack(">I", file.read(4))
    entry, entry_stop = at + 8, min(stop, at + 8 + size)
    clap, clap_stop = _find_box(file, (b"clap",), entry + SAMPLE_ENTRY, entry_stop)
    if clap_stop - clap < 32:
        return NO_CROP
    file.seek(entry + 32)
    width, height = struct.unpack(">HH", file.read(4))
    file.seek(clap)
    values = struct.unpack(">4IiIiI", file.read(32))
    across, down, off_x, off_y = (values[i] / values[i + 1] for i in (0, 2, 4, 6))
    left, top = round((width - across) / 2 + off_x), round((height - down) / 2 + off_y)
    right, bottom = width - left - round(across), height - top - round(down)
    return Crop(left, top, right, bottom) if min(left, top, right, bottom) >= 0 else NO_CROP


def _find_box(file: IO[bytes], path: tuple[bytes, ...], at: int, stop: int) -> tuple[int, int]:
    """Start and end of the content of a nested box; an empty range if it is missing."""
    for kind, low, high in boxes(file, at, stop):
        if kind == path[0]:
            return (low, high) if len(path) == 1 else _find_box(file, path[1:], low, high)
    return stop, stop


def boxes(file: IO[bytes], at: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Boxes of an mp4 as (kind, start of the content, its end)."""
    while at + 8 <= stop:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            head = 16
        size = stop - at if size == 0 else size
        if size < head:
            return
        yield kind, at + head, min(stop, at + size)
        at += size
