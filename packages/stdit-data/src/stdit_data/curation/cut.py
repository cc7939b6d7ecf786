"""Cut videos into segments without scene changes: rows with start and end; nothing is re-encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from av.video.reformatter import VideoReformatter

from stdit_data.curation.detectors import DETECTORS, Boundary, Detect, find_fades, is_black, open_detector
from stdit_data.curation.engine import Reject, Result
from stdit_data.curation.sampling import Array, frames_within
from stdit_data.curation.tables import from_dicts, segment_of, to_dicts, with_columns
from stdit_data.errors import ClipError, DataError
from stdit_data.storage import files, readers, urls
from stdit_data.video import color
from stdit_data.video.pictures import is_still, open_video
from stdit_data.video.probe import reads_clip

SMALL = 160  # pixels of the longer side that scene changes are looked for at
COLUMNS = {
    "start": pa.float64(),
    "end": pa.float64(),
    "start_reason": pa.string(),
    "end_reason": pa.string(),
    "fps": pa.float64(),
    "width": pa.int64(),
    "height": pa.int64(),
}


@dataclass(frozen=True)
class Scenes:
    """The scenes of a video before they are trimmed.

    Attributes:
        times: seconds of every frame from the video's first, and the end of the last.
        boundaries: in order.
        fps, width, height: of the video.
    """

    times: list[float]
    boundaries: list[Boundary]
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class CutStep:
    """Finds scene changes and fades, and makes a row for each segment between them.

    Args:
        detector: "adaptive" or "content" (PySceneDetect), or "transnetv2".
        threshold: of the detector; its own default without.
        trim: seconds left out on both sides of a scene change or fade, where a dissolve may still be under way.
        shortest, longest: seconds of a segment; shorter ones are dropped, longer ones divided evenly.
        fades: also end segments where the picture fades to black.
        threads: videos decoded at a time.
        shard_rows: rows a shard.
        gpus: of a worker of a Ray cluster, for TransNetV2.
    """

    detector: str = "adaptive"
    threshold: float | None = None
    trim: float = 0.5
    shortest: float = 2.0
    longest: float = 10.0
    fades: bool = True
    threads: int = 1
    shard_rows: int = 16  # raw videos are long
    gpus: float = 0.0

    name = "cut"

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise DataError(f"detector {self.detector!r}: expected {', '.join(DETECTORS)}")
        if self.trim < 0 or self.shortest < 0 or self.longest <= 0 or self.longest < self.shortest:
            raise DataError(
                f"trim {self.trim:g}, min {self.shortest:g}, max {self.longest:g}: expected seconds from 0, and max "
                "above min"
            )

    @property
    def has_model(self) -> bool:
        return self.detector == "transnetv2"

    def settings(self) -> dict[str, Any]:
        return {
            "detector": self.detector,
            "threshold": self.threshold,
            "trim": self.trim,
            "shortest": self.shortest,
            "longest": self.longest,
            "fades": self.fades,
        }

    def schema(self, given: pa.Schema) -> pa.Schema:
        frames = {"start_frame", "end_frame"}
        return with_columns(pa.schema([field for field in given if field.name not in frames]), COLUMNS)

    def open(self) -> Detect:
        return open_detector(self.detector, self.threshold)

    def run(self, shard: pa.Table, opened: Detect) -> Result:
        def cut_row(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Reject]]:
            return self._cut(row, opened)

        with readers.threads(self.threads) as pool:
            done = list(pool.map(cut_row, to_dicts(shard)))
        rows = [row for kept, _ in done for row in kept]
        rejects = [reject for _, dropped in done for reject in dropped]
        return Result(from_dicts(rows, self.schema(shard.schema)), rejects)

    def _cut(self, row: dict[str, Any], detect: Detect) -> tuple[list[dict[str, Any]], list[Reject]]:
        base = {name: value for name, value in row.items() if name not in ("start_frame", "end_frame")}
        try:
            if urls.is_image(row["path"]) and _is_still(row["path"]):
                return [base], []
            scenes = find_scenes(row["path"], row, detect, fades=self.fades)
        except ClipError as error:
            return [], [{"path": row["path"], "step": self.name, "reason": error.reason}]
        facts = {"fps": scenes.fps, "width": scenes.width, "height": scenes.height}
        rows, rejects = [], []
        for start, end, before, after in self.segments(scenes):
            span = {"start": start, "end": end, "start_reason": before, "end_reason": after}
            if end - start < self.shortest - 1e-6:
                reason = f"{max(0.0, end - start):.2f} s long, the shortest kept is {self.shortest:g} s"
                place = {"path": row["path"], "start": start, "end": end, "step": self.name, "reason": reason}
                rejects.append({**place, "column": "duration", "value": end - start, "limit": self.shortest})
            else:
                rows.append({**base, **facts, **span})
        return rows, rejects

    def segments(self, scenes: Scenes) -> list[tuple[float, float, str, str]]:
        """Return (start, end, reason of start, reason of end) in seconds, trimmed and divided, on frame times."""
        times = np.asarray(scenes.times)
        cursor, reason = 0, "start"
        spans = []
        for boundary in [*scenes.boundaries, Boundary(len(times) - 1, len(times) - 1, "end")]:
            if boundary.last > cursor:
                spans.append((cursor, boundary.last, reason, boundary.reason))
                cursor, reason = boundary.first, boundary.reason
            elif boundary.first > cursor:
                cursor, reason = boundary.first, boundary.reason
        found = []
        for first, last, before, after in spans:
            low = times[first] + (self.trim if before != "start" else 0)
            high = times[last] - (self.trim if after != "end" else 0)
            pieces = max(1, int(np.ceil((high - low) / self.longest - 1e-6)))
            edges = [_at_frame(times, low + i * (high - low) / pieces) for i in range(pieces + 1)]
            for i in range(pieces):
                inner = before if i == 0 else "length", after if i == pieces - 1 else "length"
                found.append((edges[i], edges[i + 1], *inner))
        return found


@reads_clip
def find_scenes(path: str, row: dict[str, Any], detect: Detect, *, fades: bool = True) -> Scenes:
    """Decode a video once, at a small size, and find its scene boundaries.

    Raises:
        ClipError: it can't be read.
    """
    with files.open_media(path) as media, open_video(path, media) as video:
        reformatter = VideoReformatter()
        times: list[float] = []
        black: list[bool] = []
        shape = [0, 0]

        def pictures() -> Iterator[Array]:
            for tick, frame in frames_within(video, segment_of(row)):
                if not times:
                    width, height = round(frame.width * video.aspect), frame.height
                    shape[:] = (height, width) if color.is_rotated(frame) else (width, height)
                times.append(video.seconds(tick))
                picture = _small(frame, reformatter)
                black.append(is_black(picture[..., 1]))  # green is close to luma
                yield picture

        boundaries = detect(pictures(), video.rate)
        if not times:
            raise DataError(f"no frames in the cut, {segment_of(row)}")
        if fades:
            found = find_fades(black)
            # The change from or to black is part of the fade.
            cuts = [cut for cut in boundaries if not any(fade.last <= cut.last <= fade.first for fade in found)]
            boundaries = [*cuts, *found]
        times.append(times[-1] + float(1 / video.rate))
        return Scenes(times, sorted(boundaries), float(video.rate), shape[0], shape[1])


@reads_clip
def _is_still(path: str) -> bool:
    with files.open_media(path) as media:
        return is_still(path, media)


def _small(frame: Any, reformatter: Any) -> Array:
    """Return [H, W, 3] uint8 BGR, the longer side `SMALL` pixels, as stored: not upright, pixels not square."""
    scale = min(1.0, SMALL / max(frame.width, frame.height))
    width, height = max(16, round(frame.width * scale)), max(16, round(frame.height * scale))
    small = reformatter.reformat(frame, width=width, height=height, format="bgr24", interpolation="BILINEAR", threads=1)
    return np.asarray(small.to_ndarray())


def _at_frame(times: Any, moment: float) -> float:
    """Return the time of the first frame at or after a moment."""
    return round(float(times[min(int(np.searchsorted(times, moment - 1e-6)), len(times) - 1)]), 6)
