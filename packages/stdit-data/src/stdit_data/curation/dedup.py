"""Find duplicate clips: identical files, overlapping segments of one video, and clips that look the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from stdit_data import files, stores
from stdit_data.curation.engine import Outcome, Result, rejects_path, run
from stdit_data.curation.neighbours import groups_of, near_pairs
from stdit_data.curation.sampling import read_clip
from stdit_data.curation.scorers import sharpness
from stdit_data.curation.scorers.fingerprint import perceptual_hash
from stdit_data.curation.tables import Rows, from_dicts, open_rows, segment_of, to_dicts, with_columns, write_rows
from stdit_data.errors import ClipError, DataError, StoreError
from stdit_data.manifests.validate import sha256
from stdit_data.workers.executors import Executor
from stdit_data.workers.work import Progress, Share

FLAT = 4.0  # standard deviation of 255 below which a frame is too plain for its hash to mean anything
HASH_BYTES = 32
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HashStep:
    """Computes what `dedup` compares: the file's SHA-256, perceptual hashes at a rate, and sharpness if it is missing.

    Args:
        fps: frames a second that are hashed.
        threads: clips decoded at a time.
        shard_rows: rows a shard.
    """

    fps: float = 1.0
    threads: int = 1
    shard_rows: int = 64

    name = "hash"
    gpus = 0.0
    has_model = False

    def settings(self) -> dict[str, Any]:
        return {"fps": self.fps}

    def schema(self, given: pa.Schema) -> pa.Schema:
        hashes = {"sha256": pa.string(), "sharpness": pa.float64(), "frame_hashes": pa.list_(pa.binary(HASH_BYTES))}
        return with_columns(given, hashes)

    def open(self) -> None:
        return None

    def run(self, shard: pa.Table, opened: None) -> Result:
        def hashed(row: dict[str, Any]) -> dict[str, Any]:
            try:
                clip = read_clip(row["path"], segment_of(row), fps=self.fps)
                digest = row.get("sha256") or _digest(row["path"])
            except StoreError:
                raise
            except (ClipError, OSError) as error:
                return {"reject": error.reason if isinstance(error, ClipError) else error.strerror or str(error)}
            sharp = row.get("sharpness")
            return {
                "sha256": digest,
                "sharpness": sharpness.score(clip)["sharpness"] if sharp is None else sharp,
                "frame_hashes": [perceptual_hash(grey) for grey in clip.grey if grey.std() >= FLAT],
            }

        rows = to_dicts(shard)
        with stores.threads(self.threads) as pool:
            values = list(pool.map(hashed, rows))
        kept = [row | new for row, new in zip(rows, values, strict=True) if "reject" not in new]
        rejects = [
            {**_place(row), "step": self.name, "reason": new["reject"]}
            for row, new in zip(rows, values, strict=True)
            if "reject" in new
        ]
        return Result(from_dicts(kept, self.schema(shard.schema)), rejects)


@dataclass(frozen=True)
class Matching:
    """Thresholds above which two clips count as duplicates.

    Attributes:
        distance: bits of 256 that two frames' hashes may differ in.
        share: of the shorter clip's frames that must be in the other; and of its time, for parts of one video.
        keep_all: drop nothing, only tell the groups in a column.
    """

    distance: int = 24
    share: float = 0.5
    keep_all: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.distance < 128 or not 0 < self.share <= 1:
            raise DataError(
                f"distance {self.distance}, share {self.share:g}: expected 0 to 127 bits and a share above 0, up to 1"
            )


def dedup(
    rows: Rows,
    out: str,
    executor: Executor,
    *,
    step: HashStep | None = None,
    matching: Matching | None = None,
    share: Share | None = None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Hash clips, find groups of duplicates, and keep the sharpest clip of each group.

    The kept row and the rejects name their group: the smallest row number in it. All hashes are held in memory, 32
    bytes a frame. Hashes are kept in `OUT.hashes.parquet`, so that other settings are tried without decoding again.

    Args:
        rows: the manifest.
        out: the manifest to write, .parquet.
        executor, share, progress: see `engine.run`.
        step: how frames are hashed.
        matching: when two clips are the same.
    """
    matching = matching or Matching()
    hashes = f"{out.removesuffix('.parquet')}.hashes.parquet"
    outcome = run(step or HashStep(), rows, hashes, executor, share=share, progress=progress)
    if not outcome.complete:
        return Outcome(out, False, resumed=outcome.resumed, shards=outcome.shards)
    if outcome.rows == 0:
        raise DataError(f"{rows.url}: none of {rows.count} clips can be read, see {rejects_path(hashes)}")
    hashed = open_rows(hashes)
    group, kind, kept = _decide(hashed, matching)
    names = [field for field in hashed.schema if field.name != "frame_hashes"]
    schema = with_columns(pa.schema(names), {"group": pa.int64()})
    grouped = np.flatnonzero(np.bincount(group, minlength=len(group))[group] > 1)
    group_of = dict(zip(grouped.tolist(), group[grouped].tolist(), strict=True))
    places = _places(hashed, set(group_of)) if group_of else {}

    def tables() -> Iterator[pa.Table]:
        start = 0
        for table in hashed.shards(65536):
            numbers = range(start, start + len(table))
            table = table.drop_columns(["frame_hashes"])
            column = pa.array([group_of.get(number) for number in numbers], pa.int64())
            if "group" in table.column_names:
                table = table.drop_columns(["group"])
            table = table.append_column("group", column).select(schema.names)
            chosen = np.ones(len(table), bool) if matching.keep_all else kept[start : start + len(table)] == numbers
            yield table.filter(pa.array(chosen))
            start += len(table)

    rejected = outcome.rejects
    with files.open_binary(rejects_path(hashes)) as unread, files.open_write(rejects_path(out)) as file:
        file.write(unread.read())
        for number in [] if matching.keep_all else grouped.tolist():
            if (best := int(kept[number])) != number:
                other = places[best]
                reason = f"{kind[number]} as {other['path']}, {segment_of(other)}"
                reject = {**_place(places[number]), "step": "dedup", "reason": reason, "group": group_of[number]}
                file.write(files.json_line(reject))
                rejected += 1
    written = write_rows(out, tables(), schema)
    return Outcome(out, True, written, rejected, outcome.resumed, outcome.shards)


def _decide(rows: Rows, matching: Matching) -> tuple[Array, dict[int, str], Array]:
    """Of each row its group and the row that is kept of it; and in what way rows of groups are the same as another."""
    digests, starts, ends, sharp = [], [], [], []
    hashes, counts = [], []
    for table in rows.shards(65536):
        digests += table.column("sha256").to_pylist()
        sharp.append(table.column("sharpness").to_numpy())
        segments = [segment_of(row) for row in table.select(_segment_columns(table)).to_pylist()]
        for segment, fps in zip(segments, _rates(table), strict=True):
            start, end = _seconds(segment, fps)
            starts.append(start)
            ends.append(end)
        lists = table.column("frame_hashes").combine_chunks()
        counts.append(np.diff(lists.offsets.to_numpy()))
        flat = b"".join(lists.flatten().to_pylist())
        hashes.append(np.frombuffer(flat, np.uint8).reshape(-1, HASH_BYTES))
    low, high = np.array(starts), np.array(ends)
    same_file = _overlapping(digests, low, high, matching.share)
    first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    alike = near_pairs(np.concatenate(hashes), first, distance=matching.distance, share=matching.share)
    if len(alike):  # neighbouring parts of one long take look alike and are no duplicates
        _, file = np.unique(np.array(digests), return_inverse=True)
        alike = alike[file[alike[:, 0]] != file[alike[:, 1]]]
    kind: dict[int, str] = {}
    for name, pairs in (("looks the same", alike), ("overlaps in the same file", same_file)):
        kind |= dict.fromkeys(np.unique(pairs).tolist(), name)
    for left, right in same_file.tolist():
        if low[left] == low[right] and high[left] == high[right]:
            kind[left] = kind[right] = "the same file"
    group = groups_of(rows.count, np.concatenate([same_file, alike]))
    sharpest = np.concatenate(sharp)
    order = np.lexsort((np.arange(rows.count), -sharpest, group))  # by group, then the sharpest, then the first
    leads = order[np.concatenate([[True], np.diff(group[order]) != 0])]
    kept = np.empty(rows.count, np.int64)
    kept[order] = np.repeat(leads, np.diff(np.append(np.flatnonzero(np.isin(order, leads)), rows.count)))
    return group, kind, kept


def _overlapping(digests: list[str], low: Array, high: Array, share: float) -> Array:
    """Return [pairs, 2]: segments of identical files that share enough of the shorter one's time."""
    by_file: dict[str, list[int]] = defaultdict(list)
    for number, digest in enumerate(digests):
        by_file[digest].append(number)
    pairs = []
    for numbers in by_file.values():
        numbers.sort(key=lambda number: (low[number], number))
        for i, left in enumerate(numbers):
            for right in numbers[i + 1 :]:
                if low[right] >= high[left] and low[right] > low[left]:
                    break
                common = min(high[left], high[right]) - low[right]
                shorter = min(high[left] - low[left], high[right] - low[right])
                if common >= share * shorter:
                    pairs.append(sorted((left, right)))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _segment_columns(table: pa.Table) -> list[str]:
    wanted = ("path", "start", "end", "start_frame", "end_frame")
    return [name for name in wanted if name in table.column_names]


def _rates(table: pa.Table) -> list[float | None]:
    return table.column("fps").to_pylist() if "fps" in table.column_names else [None] * len(table)


def _seconds(segment: Any, fps: float | None) -> tuple[float, float]:
    """Return a segment's start and end in seconds; infinity if it has no end."""
    rate = fps or 25.0  # of frames that are given for a video of unknown rate: the same for all of its parts
    low = segment.start if segment.start is not None else (segment.start_frame or 0) / rate
    high = segment.end if segment.end is not None else None if segment.end_frame is None else segment.end_frame / rate
    return float(low), 1e9 if high is None else float(high)


def _places(rows: Rows, numbers: set[int]) -> dict[int, dict[str, Any]]:
    """Return path and segment of some rows, by row number."""
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for table in rows.shards(65536):
        here = sorted(number for number in numbers if start <= number < start + len(table))
        picked = table.select(_segment_columns(table)).take(pa.array([number - start for number in here], pa.int64()))
        found |= dict(zip(here, to_dicts(picked), strict=True))
        start += len(table)
    return found


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("path", "start", "end") if name in row}


@lru_cache(maxsize=64)
def _digest(path: str) -> str:
    """Return the SHA-256 of a file; cached, as a video's segments are neighbours in a manifest."""
    return sha256(path)
