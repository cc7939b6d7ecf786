"""Open one video stream of a file and decode it from any time, frame-exact.

Times are integer ticks of the stream's time base, as in FFmpeg; they need not start at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any

import av
from av.error import FFmpegError

from stdit_data.errors import DataError

DEFAULT_RATE = Fraction(25)  # FFmpeg's own guess for a stream that has neither rate nor timestamps


class VideoStream:
    """An open video stream; a context manager.

    Args:
        media: path, or a seekable binary file.
        stream: number of the video stream, from 0; without it FFmpeg's choice (by bit rate, then number of frames;
            a cover picture only if there is nothing else).

    Attributes:
        rate: average frames per second, as declared or guessed by FFmpeg.
        time_base: seconds per tick.
        first: tick of the first frame.
        declared: number of frames in the file's index (mp4 and mov); 0 without an index.
        timed: False where frames have no reliable timestamps (raw streams, AVI with B-frames, MPEG program streams):
            ticks then count frames, and decoding always starts at the beginning.
        packets: number of packets that the last call of `timestamps` found, including those not shown.

    Raises:
        FFmpegError, OSError: FFmpeg can't open the file.
        DataError: the file has no such video stream.
    """

    def __init__(self, media: str | IO[bytes], stream: int | None = None) -> None:
        self._media, self._which = media, stream
        self.packets = 0
        self._open()
        try:
            self._read_header()
        except Exception:
            self.close()
            raise

    def _open(self) -> None:
        if not isinstance(self._media, str):
            self._media.seek(0)
        self.container = av.open(self._media, metadata_errors="ignore")
        try:
            self.video = self._choose()
        except Exception:
            self.container.close()
            raise
        self.video.codec_context.thread_count = 1  # the loader's threads already fill the cores

    def _reopen(self) -> None:
        self.container.close()
        self._open()

    def _read_header(self) -> None:
        self.rate = self.video.average_rate or self.video.guessed_rate or self.video.base_rate or DEFAULT_RATE
        format_name = self.container.format.name
        self.declared = int(self.video.frames or 0) if "mp4" in format_name else 0
        # AVI has no presentation times, and MPEG program streams have some, which FFmpeg extends differently after a
        # seek. AVI without reordered frames is fine.
        guessed = format_name == "mpeg" or (format_name == "avi" and self.video.codec_context.has_b_frames)
        start = None if guessed else self._start()
        self.timed = start is not None
        self.time_base = self.video.time_base if self.timed and self.video.time_base else 1 / self.rate
        self.first = start or 0

    def _start(self) -> int | None:
        """The first frame's tick, of its packet where the header has none (short Matroska files); None without any."""
        if self.video.start_time is not None:
            return int(self.video.start_time)
        packet = next((packet for packet in self.container.demux(self.video) if packet.size), None)
        self._reopen()
        return None if packet is None or packet.pts is None else int(packet.pts)

    def _choose(self) -> Any:
        videos = self.container.streams.video
        if not videos:
            raise DataError("holds no video stream")
        if self._which is None:
            return self.container.streams.best("video") or videos[0]
        if not 0 <= self._which < len(videos):
            raise DataError(f"no video stream {self._which}; expected 0 to {len(videos) - 1}")
        return videos[self._which]

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def aspect(self) -> float:
        """Pixel aspect ratio, width over height."""
        return float(self.video.sample_aspect_ratio or 1)

    @property
    def duration(self) -> float | None:
        """Duration in seconds, as declared by the stream or else the file; None if by neither."""
        if self.video.duration and self.video.time_base:
            return float(self.video.duration * self.video.time_base)
        if self.container.duration:  # in Matroska counted from time zero, not from the first frame
            late = float(self.first * self.time_base) if "matroska" in self.container.format.name else 0.0
            return max(0.0, float(self.container.duration / av.time_base) - late)
        return None

    def count(self) -> int:
        """Return the number of frames: as declared, else estimated from duration and rate, else counted."""
        if self.declared:
            return self.declared
        if self.duration is not None and self.timed:
            return max(1, round(self.duration * self.rate))
        return len(self.timestamps())

    @property
    def slack(self) -> Fraction:
        """Seconds by which a frame may seem late, since containers round times to ticks.

        A frame due within one tick (or a quarter of a frame, if that is less) counts as shown.
        """
        return min(self.time_base, 1 / (4 * self.rate))

    def ticks(self, seconds: float | Fraction) -> int:
        """Return the last tick at or before a time in seconds from the first frame, with `slack`."""
        return self.first + (Fraction(seconds) + self.slack) // self.time_base

    def seconds(self, tick: int) -> float:
        """Return the time from the first frame to a tick, in seconds."""
        return float((tick - self.first) * self.time_base)

    def timestamps(self) -> list[int]:
        """Return the ticks of all frames in order; reads the packets of the whole file and decodes nothing."""
        self._reopen()
        self.packets = 0
        ticks: list[int] = []
        for packet in self.container.demux(self.video):
            self.packets += bool(packet.size)
            if packet.size and not packet.is_discard:
                stamp = packet.pts if packet.pts is not None else packet.dts
                ticks.append(len(ticks) if stamp is None or not self.timed else stamp)
        return sorted(ticks)

    def all_frames(self) -> Iterator[tuple[int, Any]]:
        """Decode all frames, as (tick, frame)."""
        self._reopen()
        return self._stamped(self.container.demux(self.video))

    def frames_from(self, tick: int) -> Iterator[tuple[int, Any]]:
        """Decode from the frame on screen at `tick` (the last one not after it, or the first), as (tick, frame).

        Seeks to a key frame before it and decodes forward. Where a container leads to a key frame that is shown later
        than `tick` (as with B-frames and open GOPs), it seeks further back, at last to the beginning.
        """
        back = 0
        while True:
            frames = self._frames_near(tick - back)
            current = next(frames, None)
            if tick - back <= self.first or not self.timed or (current is not None and current[0] <= tick):
                break
            back = max(2 * back, int(1 / self.time_base))
        if current is None:
            return
        for following in frames:
            if following[0] > tick:
                yield current
                current = following
                break
            current = following
        yield current
        yield from frames

    def _frames_near(self, tick: int) -> Iterator[tuple[int, Any]]:
        """Decode from a key frame that may lie before or after `tick`."""
        if tick <= self.first or not self.timed:
            return self.all_frames()
        try:
            self.container.seek(tick, stream=self.video, backward=True)
        except FFmpegError:  # not seekable, or no earlier entry in the index
            return self.all_frames()
        return self._stamped(_from_key(self.container.demux(self.video)))

    def _stamped(self, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        previous, step = None, int(1 / self.rate / self.time_base) or 1
        for packet in packets:
            for frame in packet.decode():
                tick = frame.pts if self.timed else None
                if tick is None:  # a gap in the timestamps, or none at all
                    tick = self.first if previous is None else previous + step
                previous = tick
                yield tick, frame


def _from_key(packets: Iterator[Any]) -> Iterator[Any]:
    """Drop packets before the first key frame: some containers seek to a byte, and decoders accept what follows."""
    started = False
    for packet in packets:
        started = started or packet.is_keyframe
        if started:
            yield packet
