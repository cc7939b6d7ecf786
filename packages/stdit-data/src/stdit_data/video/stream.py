"""Open one video stream of a file and decode it from any time, frame-exact.

Times are integer ticks of the stream's time base, as in FFmpeg; they need not start at 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import IO, Any

import av
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.stream import Disposition

from stdit_data.errors import DataError
from stdit_data.video.crop import find_crop
from stdit_data.video.filters import FrameFilter
from stdit_data.video.timeline import (
    Packets,
    Timeline,
    file_key,
    plan_all,
    plan_frames,
    plan_index,
    read_packets,
    remember,
    remembered,
)

DEFAULT_RATE = Fraction(25)  # FFmpeg's own guess for a stream that has neither rate nor timestamps
LEADING = 5  # packets at the start of a stream that may hold frames shown before its first key frame
LONGEST_GROUP = 300  # frames; without a key frame among so many, a stream is one that needs none (intra refresh)
MOST_PIXEL_ASPECT = 10  # and 1/10: real pixels are between 0.4 and 4 times as wide as high
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class VideoStream:
    """An open video stream; a context manager.

    Args:
        media: path, or a seekable binary file.
        stream: number of the video stream, from 0, cover pictures not counted; without it FFmpeg's choice (by bit rate,
            then number of frames).

    Attributes:
        codec: FFmpeg's name of the codec.
        streams: number of video streams in the file, cover pictures not counted.
        rate: average frames per second, as declared or guessed by FFmpeg.
        time_base: seconds per tick.
        first: tick of the first frame that can be shown.
        declared: number of frames in the file's index (mp4 and mov), also those not shown; 0 without an index.
        timed: False where frames have no reliable timestamps (raw streams, AVI with B-frames, MPEG program streams,
            timestamps that start again): ticks then count frames, and decoding always starts at the beginning.
        alpha: whether an alpha channel counts; in AVI its byte is undefined.
        packets: number of packets that the last call of `timestamps` found, including those not shown.

    Raises:
        FFmpegError, OSError: FFmpeg can't open the file.
        DataError: the file has no such video stream, or its pixel aspect ratio makes no sense.
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
        plan_index(self._media)
        if not isinstance(self._media, str):
            self._media.seek(0)
        self.container = av.open(self._media, metadata_errors="ignore")
        try:
            self.video = self._choose()
        except Exception:
            self.container.close()
            raise
        self.video.codec_context.thread_count = 1  # the loader's threads already fill the cores

    def reopen(self) -> None:
        """Reopen the file, with a new decoder."""
        self.container.close()
        self._open()

    def _choose(self) -> Any:
        videos = _videos(self.container)
        if not videos:
            cover = ", only a cover picture" if self.container.streams.video else ""
            raise DataError(f"holds no video stream{cover}")
        self.streams = len(videos)
        if self._which is None:
            best = self.container.streams.best("video")
            return best if best in videos else videos[0]
        if not 0 <= self._which < len(videos):
            raise DataError(f"no video stream {self._which}; expected 0 to {len(videos) - 1}")
        return videos[self._which]

    def _read_header(self) -> None:
        context = self.video.codec_context
        self.codec = context.name
        self.rate = self.video.average_rate or self.video.guessed_rate or self.video.base_rate or DEFAULT_RATE
        self._format = self.container.format.name
        self.declared = int(self.video.frames or 0) if "mp4" in self._format else 0
        self.alpha = self._format != "avi"
        self._check_aspect()
        # Palettes are sent at the start of a file and where they change: a seek would lose them.
        self._seeks = context.pix_fmt != "pal8"
        # FFmpeg's own decoders leave the alpha channel of WebM out.
        self._decoder = WITH_ALPHA.get(self.codec) if self.video.metadata.get("alpha_mode") == "1" else None
        key = file_key(self._media, self._which)
        self._adopt(key, remembered(key) or self._find_timeline())

    def _check_aspect(self) -> None:
        stated = self.video.sample_aspect_ratio
        if stated and not 1 / MOST_PIXEL_ASPECT <= stated <= MOST_PIXEL_ASPECT:
            raise DataError(
                f"pixel aspect ratio {stated.numerator}:{stated.denominator}, expected 1:{MOST_PIXEL_ASPECT} to "
                f"{MOST_PIXEL_ASPECT}:1; correct the file's aspect ratio"
            )

    def _adopt(self, key: Hashable | None, timeline: Timeline) -> None:
        self._key, self._timeline = key, timeline
        remember(key, timeline)
        self.timed, self.first = timeline.timed, timeline.first
        self.time_base = self.video.time_base if self.timed and self.video.time_base else 1 / self.rate

    def _find_timeline(self) -> Timeline:
        crop = find_crop(self._media, _videos(self.container).index(self.video), self._format)
        packets = (packet for packet in self.container.demux(self.video) if packet.size)
        head = list(islice(packets, LEADING if self.video.codec_context.has_b_frames else 1))
        start = head[0].pts if head and head[0].pts is not None else self.video.start_time
        cut = bool(head) and (head[0].is_discard or not head[0].is_keyframe)
        leading = start is not None and any(packet.pts is not None and packet.pts < start for packet in head)
        # AVI has no presentation times, and MPEG program streams have some, which FFmpeg extends differently after a
        # seek. AVI without reordered frames is fine.
        if self._format == "avi" and self.video.codec_context.has_b_frames:
            return Timeline(timed=False, first=0, cut=cut, crop=crop)
        if self._format == "mpeg" or start is None:
            return Timeline(timed=False, first=0, cut=cut or leading, crop=crop)
        timeline = Timeline(True, int(start), cut or leading or self.video.start_time not in (None, start), crop)
        if timeline.cut:
            timeline = replace(timeline, first=self._first_shown(timeline, key=not head[0].is_keyframe))
        # Files with an index of key frames are not read through now. Others are searched by timestamp, which ends
        # anywhere if the timestamps start again, as they may in an edit list.
        edited = self.declared > 0 and not self._index_is_whole()
        indexed = "matroska" in self._format or ("mp4" in self._format and not edited)
        return timeline if indexed else self._counted(timeline)

    def _first_shown(self, timeline: Timeline, *, key: bool) -> int:
        """Return the tick of the first frame that decodes whole: with `key` a key frame, if one is near."""
        self._adopt(None, timeline)
        whole = ((tick, frame.key_frame) for tick, frame in self._all() if not frame.is_corrupt)
        head = list(islice(whole, LONGEST_GROUP if key else 1))
        return next((tick for tick, is_key in head if is_key or not key), head[0][0] if head else timeline.first)

    def _counted(self, timeline: Timeline) -> Timeline:
        """Count the frames by a pass over the packets; by decoding where packets don't tell."""
        found = self._all_packets()
        if timeline.timed and found.ticks is not None and not found.restarts:
            ticks = [tick for tick in found.ticks if tick >= timeline.first]
            length = (ticks[-1] - timeline.first) * (self.video.time_base or 1 / self.rate) if ticks else 0
            return replace(timeline, count=len(ticks), end=float(length + 1 / self.rate))
        timeline, count = replace(timeline, timed=False, first=0), found.shown
        if found.restarts or timeline.cut:
            self._adopt(None, timeline)
            count = sum(1 for _ in self._all())
        return replace(timeline, count=count, end=float(count / self.rate))

    def _all_packets(self) -> Packets:
        self.reopen()
        plan_all(self._media)
        return read_packets(self.container.demux(self.video), self.codec)

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
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        if self.indexed:
            return float(self.video.duration * self.time_base)
        self.count()
        return self._timeline.end or 0.0

    @property
    def indexed(self) -> bool:
        """Whether the file's index tells the number of frames."""
        return self._index_is_whole() and not self._timeline.cut

    def _index_is_whole(self) -> bool:
        """Whether an mp4's index names all frames, rather than the first fragment's, and no edit list hides any."""
        if not self.declared or self.declared != len(self.video.index_entries):
            return False
        length = (self.video.duration or 0) * (self.video.time_base or 0) * self.rate
        return bool(abs(length - self.declared) < 1)

    def count(self) -> int:
        """Return the number of frames that a full decode shows, from the index or a pass over all packets."""
        if self.indexed:
            return self.declared
        if self._timeline.count is None:
            self._adopt(self._key, self._counted(self._timeline))
        return self._timeline.count or 0

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
        found = self._all_packets()
        self.packets = found.total
        if not self.timed or found.ticks is None:
            return list(range(self.count()))
        return [tick for tick in found.ticks if tick >= self.first]

    def all_frames(self) -> Iterator[tuple[int, Any]]:
        """Decode all frames, as (tick, frame)."""
        return ((tick, frame) for tick, frame in self._all() if tick >= self.first or not self.timed)

    def _all(self) -> Iterator[tuple[int, Any]]:
        self.reopen()
        return self._stamped(self.container.demux(self.video))

    def frames_from(self, tick: int, until: int | None = None) -> Iterator[tuple[int, Any]]:
        """Decode from the frame on screen at `tick` (the last one not after it, or the first), as (tick, frame).

        Up to the frame at `until` (by default that at `tick`) the bytes of a file in a store are fetched together.

        Seeks to a key frame before it and decodes forward. Where a container leads to a key frame that is shown later
        than `tick` (as with B-frames and open GOPs), it seeks further back, at last to the beginning.
        """
        back = 0
        while True:
            frames = self._frames_near(tick - back, tick if until is None else until)
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

    def _frames_near(self, tick: int, until: int) -> Iterator[tuple[int, Any]]:
        """Decode from a key frame that may lie before or after `tick`."""
        if tick <= self.first or not self.timed or not self._seeks:
            self._plan(self.first, until)
            return self.all_frames()
        self._plan(tick, until)
        try:
            self.container.seek(tick, stream=self.video, backward=True)
        except FFmpegError:  # not seekable, or no earlier entry in the index
            return self.all_frames()
        self._plan(tick, until)  # some indexes are read by the first seek
        return self._stamped(_from_key(self.container.demux(self.video)))

    def _plan(self, tick: int, until: int) -> None:
        if self.timed:
            plan_frames(self._media, self.video, tick, until)

    def _stamped(self, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        previous, step = None, int(1 / self.rate / self.time_base) or 1
        for frame in self._decoded(packets):
            tick = frame.pts if self.timed else None
            if tick is None:  # a gap in the timestamps, or none at all
                tick = self.first if previous is None else previous + step
            previous = tick
            yield tick, frame

    def _decoded(self, packets: Iterator[Any]) -> Iterator[Any]:
        other = av.CodecContext.create(self._decoder, "r") if self._decoder else None
        crop, started = FrameFilter(), False
        for packet in packets:
            # At first a decoder may complain about headers and frames that it has not seen.
            with nullcontext() if started else suppress(InvalidDataError, ArgumentError):
                for frame in other.decode(packet) if other else packet.decode():
                    started = True
                    yield crop(frame, self._timeline.crop.filter(frame.width, frame.height))


def _videos(container: Any) -> list[Any]:
    """The video streams without cover pictures, which some files have beside or in place of a video."""
    return [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]


def _from_key(packets: Iterator[Any]) -> Iterator[Any]:
    """Drop packets before the first key frame: some containers seek to a byte, and decoders accept what follows."""
    started = False
    for packet in packets:
        started = started or packet.is_keyframe
        if started:
            yield packet
