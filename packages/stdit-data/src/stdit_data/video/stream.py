"""One video stream of a file: what it says of itself, and its frames from any moment on, exactly as a full decode
gives them.

Times are integer ticks of the stream's time base, as FFmpeg counts them; they need not start at 0.
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
    """An open video stream. Use as a context manager.

    Args:
        media: a path, or a binary file that can seek.
        stream: which of the file's video streams, from 0; without it the best by FFmpeg's rules (rate of
            bits, then number of frames; never a cover picture if there is another).

    Attributes:
        rate: frames a second on average, as the file says or FFmpeg guesses.
        time_base: seconds per tick.
        first: tick of the first frame.
        declared: frames that the file's index lists (mp4 and mov); 0 where there is no such index.
        timed: False where frames have no timestamps to rely on (raw streams, AVI with B-frames, MPEG program streams):
            ticks then count frames, and all decoding starts at the beginning.
        packets: how many the last call of `timestamps` found, hidden ones included.

    Raises:
        FFmpegError, OSError: the file can't be opened or holds no video that FFmpeg knows.
        DataError: there is no such stream.
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
        """The first frame's tick; None where frames have none. Some short Matroska files don't say, but their packets
        do."""
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
            raise DataError(f"stream {self._which} asked for, but the file's video streams are 0 to {len(videos) - 1}")
        return videos[self._which]

    def close(self) -> None:
        self.container.close()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def aspect(self) -> float:
        """Width over height of one pixel."""
        return float(self.video.sample_aspect_ratio or 1)

    @property
    def duration(self) -> float | None:
        """Seconds, as the stream or else its file says; None where neither does."""
        if self.video.duration and self.video.time_base:
            return float(self.video.duration * self.video.time_base)
        if self.container.duration:  # in Matroska counted from time zero, not from the first frame
            late = float(self.first * self.time_base) if "matroska" in self.container.format.name else 0.0
            return max(0.0, self.container.duration / av.time_base - late)
        return None

    def count(self) -> int:
        """Frames, as declared or reckoned from duration and rate (a guess), else counted (`timestamps`)."""
        if self.declared:
            return self.declared
        if self.duration is not None and self.timed:
            return max(1, round(self.duration * self.rate))
        return len(self.timestamps())

    @property
    def slack(self) -> Fraction:
        """Seconds that a frame may claim to come late, since containers round times to their ticks: what is due within
        one tick (or a quarter of a frame, if that is less) counts as already there."""
        return min(self.time_base, 1 / (4 * self.rate))

    def ticks(self, seconds: float | Fraction) -> int:
        """The last tick at or before a moment (seconds from the first frame), with `slack`."""
        return self.first + (Fraction(seconds) + self.slack) // self.time_base

    def seconds(self, tick: int) -> float:
        """From the first frame to a tick."""
        return float((tick - self.first) * self.time_base)

    def timestamps(self) -> list[int]:
        """The ticks of all frames in order, from the packets alone (reads the whole file, decodes nothing)."""
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
        """(tick, frame) of a full decode."""
        self._reopen()
        return self._stamped(self.container.demux(self.video))

    def frames_from(self, tick: int) -> Iterator[tuple[int, Any]]:
        """(tick, frame) from the frame on screen at `tick` on: the last one not after it, or the first of all.

        Seeks to a key frame before it and decodes forward. Where a container leads to a key frame that is shown only
        later (as happens with B-frames and open GOPs), it seeks again, further back, in the end to the beginning.
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
        """Frames from a key frame that may or may not be before `tick`."""
        if tick <= self.first or not self.timed:
            return self.all_frames()
        try:
            self.container.seek(tick, stream=self.video, backward=True)
        except FFmpegError:  # not seekable, or there is nothing before it in the index
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
    """Drops what comes before a key frame: some containers seek to a byte, and decoders make do with what they get."""
    started = False
    for packet in packets:
        started = started or packet.is_keyframe
        if started:
            yield packet
