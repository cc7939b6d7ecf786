"""What a stream's packets tell of its frames, without decoding, how much of it is remembered, and where they lie.

Ticks are as in `stream`: integers of the stream's time base.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from io import SEEK_END
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

from stdit_data.storage.remote_file import RemoteFile
from stdit_data.video.crop import NO_CROP, Crop, boxes

BEFORE_INDEX = frozenset((b"ftyp", b"free", b"skip", b"wide", b"uuid", b"mdat"))  # boxes of an mp4
MOST_SOUND = 256 << 10  # bytes between two packets of a video that are fetched with the second
MOST_REMEMBERED = 1 << 16  # files; about 30 MB


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where a stream's frames lie; remembered for each file, since some of it costs a pass over all packets.

    Attributes:
        timed: whether the frames have timestamps to rely on, see `VideoStream`.
        first: tick of the first frame that can be shown.
        cut: the stream begins with packets that decode to nothing: in the middle of a group of pictures, or hidden by
            an edit list.
        crop: that players apply.
        count: number of frames; None while not counted.
        end: seconds from the first frame to the end of the last; None while not counted.
    """

    timed: bool
    first: int
    cut: bool = False
    crop: Crop = NO_CROP
    count: int | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Packets:
    """A pass over the packets of a stream.

    Attributes:
        total: packets with data, including those that are not shown.
        ticks: of the shown ones, sorted; None if one of them has no timestamp.
        shown: number of packets that hold a frame to be shown.
        restarts: the timestamps begin again somewhere, as where two streams are joined.
    """

    total: int
    ticks: list[int] | None
    shown: int
    restarts: bool


def read_packets(packets: Iterable[Any], codec: str) -> Packets:
    """Count the packets (`av.Packet`) of a stream and collect their timestamps."""
    total = shown = 0
    ticks: list[int] = []
    restarts, last_key, since_key = False, None, 0
    for packet in packets:
        if not packet.size:
            continue
        total += 1
        since_key += 1
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.is_keyframe and stamp is not None:
            # Key frames are shown in the order they are coded, whatever lies between them.
            if last_key is not None and (stamp < last_key or (stamp == last_key and since_key > 1)):
                restarts = True
            last_key, since_key = stamp, 0
        if packet.is_discard or (codec == "vp8" and _is_hidden(packet)):
            continue
        shown += 1
        if stamp is not None:
            ticks.append(stamp)
    return Packets(total, sorted(ticks) if len(ticks) == shown else None, shown, restarts)


def _is_hidden(packet: Any) -> bool:
    """Whether a VP8 packet is a reference that is not shown (RFC 6386, 9.1: show_frame)."""
    return not memoryview(packet)[0] & 0x10


_remembered: dict[Hashable, Timeline] = {}
_lock = Lock()


def remembered(key: Hashable | None) -> Timeline | None:
    """Return what is known of a file, see `file_key`."""
    return None if key is None else _remembered.get(key)


def remember(key: Hashable | None, timeline: Timeline) -> None:
    """Keep a timeline for the next time that the file is opened; the oldest of many are forgotten."""
    if key is None:
        return
    with _lock:
        if len(_remembered) >= MOST_REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = timeline


def file_key(media: str | IO[bytes], stream: int | None) -> Hashable | None:
    """Return a key that changes when the file does; None for a file without a name."""
    if isinstance(media, str):
        path = Path(media)
        if not path.is_file():
            return None
        facts = path.stat()
        return media, stream, facts.st_size, facts.st_mtime_ns, facts.st_ino
    url = getattr(media, "url", None)
    if url is None:
        return None
    return url, stream, media.seek(0, SEEK_END)


def plan_index(media: str | IO[bytes]) -> None:
    """Have the index of an mp4 or mov file in a store fetched at once."""
    if not isinstance(media, RemoteFile):
        return
    for kind, start, end in islice(boxes(cast(IO[bytes], media), 0, media.size), 8):
        if kind == b"moov":
            media.plan(start, end)
        if kind not in BEFORE_INDEX:
            return


def plan_all(media: str | IO[bytes]) -> None:
    """Have the packets of a file in a store fetched in few requests."""
    if isinstance(media, RemoteFile):
        media.plan(0, media.size)


def plan_frames(media: str | IO[bytes], video: Any, tick: int, until: int) -> None:
    """Have the packets that some frames are decoded from fetched at once, where the file's index tells their place.

    Args:
        media: the file; planned if it is in a store.
        video: its stream, an `av.VideoStream`.
        tick, until: first and last frame.
    """
    if not isinstance(media, RemoteFile):
        return
    entries = video.index_entries
    last = entries.search_timestamp(until, any_frame=True)
    if last < 0:
        return
    # The index of an mp4 has the times of decoding, by which a frame comes before it is shown.
    early = max(0, (video.start_time or 0) - entries[0].timestamp)
    first = max(0, entries.search_timestamp(tick - early))
    start, more = entries[first].pos, 1
    if entries[last].size:  # unlike an index of key frames alone
        # A decoder takes some packets more before it gives the last frame, and sound may lie between two packets.
        more = video.codec_context.has_b_frames + 2
        before = entries[max(0, first - 1)]
        start = min(start, max(before.pos + before.size, start - MOST_SOUND))
    end = entries[min(last + more, len(entries) - 1)]
    media.plan(start, end.pos + end.size)
