"""Find duplicate clips: identical files, overlapping segments of one video, and clips that look the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from stdit_data.curation.engine import Outcome, Result, check_out, rejects_path, run
from stdit_data.curation.neighbours import groups_of, near_pairs
from stdit_data.curation.sampling import read_clip
from stdit_data.curation.scorers import sharpness
from stdit_data.curation.scorers.fingerprint import perceptual_hash
from stdit_data.curation.tables import Rows, from_dicts, open_rows, segment_of, to_dicts, with_columns, write_rows
from stdit_data.errors import ClipError, DataError, StoreError
from stdit_data.manifests.arrays import floats
from stdit_data.manifests.validate import sha256
from stdit_data.storage import atomic, files, readers
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

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise DataError(f"fps {self.fps:g}: expected a rate above 0, up to 1000")

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
        with readers.threads(self.threads) as pool:
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
    check_out(out, rows)
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
    with files.open_binary(rejects_path(hashes)) as unread, atomic.open_write(rejects_path(out)) as file:
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
    digests, lows, highs, sharp, hashes, counts = [], [], [], [], [], []
    for table in rows.shards(65536):
        digests.append(table.column("sha256"))
        sharp.append(table.column("sharpness").to_numpy())
        low, high = _seconds(table)
        lows.append(low)
        highs.append(high)
        lists = table.column("frame_hashes").combine_chunks()
        counts.append(np.diff(lists.offsets.to_numpy()))
        flat = lists.flatten()
        data = flat.buffers()[1] if len(flat) else b""
        data = np.ndarray((flat.offset + len(flat), HASH_BYTES), np.uint8, data)
        hashes.append(data[flat.offset :])
    low, high = np.concatenate(lows), np.concatenate(highs)
    names = pa.chunked_array(chain.from_iterable(column.chunks for column in digests))
    file = names.dictionary_encode().combine_chunks().indices.to_numpy()
    same_file = _overlapping(file, low, high, matching.share)
    first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    alike = near_pairs(np.concatenate(hashes), first, distance=matching.distance, share=matching.share)
    if len(alike):  # neighbouring parts of one long take look alike and are no duplicates
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


def _overlapping(file: Array, low: Array, high: Array, share: float) -> Array:
    """Return [pairs, 2]: segments of identical files that share enough of the shorter one's time.

    Args:
        file: a number for each distinct file, [rows].
        low, high: start and end of each segment in seconds, [rows].
        share: of the shorter one's time.
    """
    order = np.lexsort((low, file))  # stable: then by row
    file, low, high = file[order], low[order], high[order]
    pairs = []
    left, ahead = np.arange(len(order)), 1
    while len(left := left[: np.searchsorted(left, len(order) - ahead)]):
        right = left + ahead
        # Later ones begin later: what lies behind a segment ends the search for it.
        goes_on = (file[left] == file[right]) & ((low[right] < high[left]) | (low[right] == low[left]))
        left, right = left[goes_on], right[goes_on]
        common = np.minimum(high[left], high[right]) - low[right]
        enough = common >= share * np.minimum(high[left] - low[left], high[right] - low[right])
        pairs.append(np.sort(np.stack([order[left[enough]], order[right[enough]]], axis=1), axis=1))
        ahead += 1
    return np.concatenate(pairs).astype(np.int64) if pairs else np.zeros((0, 2), np.int64)


def _segment_columns(table: pa.Table) -> list[str]:
    wanted = ("path", "start", "end", "start_frame", "end_frame")
    return [name for name in wanted if name in table.column_names]


def _seconds(table: pa.Table) -> tuple[Array, Array]:
    """Return the start and end of each row's segment in seconds; a billion if it has no end."""

    def numbers(name: str) -> Array:
        if name not in table.column_names:
            return np.full(len(table), np.nan)
        return floats(table.column(name).combine_chunks())

    rate = np.nan_to_num(numbers("fps"))
    rate[rate == 0] = 25.0  # of frames that are given for a video of unknown rate: the same for all of its parts
    start, end = numbers("start"), numbers("end")
    low = np.where(np.isnan(start), np.nan_to_num(numbers("start_frame")) / rate, start)
    high = np.where(np.isnan(end), numbers("end_frame") / rate, end)
    return low, np.where(np.isnan(high), 1e9, high)


def _places(rows: Rows, numbers: set[int]) -> dict[int, dict[str, Any]]:
    """Return path and segment of some rows, by row number."""
    found: dict[int, dict[str, Any]] = {}
    ordered = np.array(sorted(numbers), np.int64)
    start = 0
    for table in rows.shards(65536):
        here = ordered[slice(*np.searchsorted(ordered, (start, start + len(table))))]
        picked = table.select(_segment_columns(table)).take(pa.array(here - start))
        found |= dict(zip(here.tolist(), to_dicts(picked), strict=True))
        start += len(table)
    return found


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("path", "start", "end") if name in row}


@lru_cache(maxsize=64)
def _digest(path: str) -> str:
    """Return the SHA-256 of a file; cached, as a video's segments are neighbours in a manifest."""
    return sha256(path)
