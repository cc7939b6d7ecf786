"""Compare what is read of a video with a full decode."""

from __future__ import annotations

import zlib
from itertools import islice
from typing import Any

from av.video.reformatter import VideoReformatter

from stdit_data.errors import DataError
from stdit_data.video.color import to_rgb
from stdit_data.video.stream import VideoStream

PLACES = 8  # evenly spread over the video, the first and last frame among them


def check_against_decode(video: VideoStream) -> None:
    """Decode a video whole, and compare its number of frames and the frames after seeks with what that shows.

    Args:
        video: the open stream.

    Raises:
        DataError: a frame is damaged, or reading gives other frames than a full decode.
        FFmpegError: the video is damaged so that FFmpeg can't continue.
    """
    reformatter = VideoReformatter()

    def checksum(frame: Any) -> int:
        return zlib.crc32(to_rgb(frame, reformatter, alpha=video.alpha).numpy().tobytes())

    ticks, sums = [], []
    for tick, frame in video.all_frames():
        if frame.is_corrupt:
            raise DataError(f"damaged at {video.seconds(tick):.3f} s")
        ticks.append(tick)
        sums.append(checksum(frame))
    if len(ticks) != video.count():
        raise DataError(f"{len(ticks)} frames decode, {video.count()} are counted without decoding; remux or re-encode")
    for place in sorted({(len(ticks) - 1) * i // (PLACES - 1) for i in range(PLACES)}):
        video.reopen()  # as a clip is read: by a decoder that has seen nothing
        read = [checksum(frame) for _, frame in islice(video.frames_from(ticks[place]), 2)]
        if read != sums[place : place + 2]:
            raise DataError(
                f"a seek to frame {place}, {video.seconds(ticks[place]):.3f} s, gives another picture than a full "
                "decode; re-encode it"
            )
