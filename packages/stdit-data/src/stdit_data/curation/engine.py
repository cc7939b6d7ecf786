"""Run a step over a manifest, shard by shard: in local processes, as one share of several, or on a Ray cluster.

A step is a pure function of a shard. A finished shard is a file in the folder `OUT.parts`, named by the step, its
settings and the shard's rows and written whole, so a run that was killed does no finished shard again, and the joined
manifest has the same bytes however the work was divided.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data.curation.tables import Rows, write_rows
from stdit_data.errors import DataError
from stdit_data.storage import atomic, files, listing, urls
from stdit_data.workers.executors import Executor, Task
from stdit_data.workers.work import Progress, Share, resumable, run_shards

VERSION = 1  # of what the steps compute; another one makes finished shards outdated
IN_FOLDER = 1000  # parts
RECORD = b"stdit.curation"  # key of an output's Parquet metadata
Reject = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The output of a step for one shard: the rows that it passes on, and those that it dropped, with reasons."""

    rows: pa.Table
    rejects: list[Reject] = field(default_factory=list)


class Step(Task, Protocol):
    """One operation on a manifest."""

    @property
    def shard_rows(self) -> int:
        """Return the number of rows per shard."""

    def settings(self) -> Mapping[str, Any]:
        """Return everything besides the rows that the results depend on, as JSON."""

    def schema(self, given: pa.Schema) -> pa.Schema:
        """Return the columns of the rows that the step passes on."""

    def run(self, shard: pa.Table, opened: Any) -> Result:
        """Return the result for one shard."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        out: the manifest.
        complete: False while other processes are at their shards, and `out` is not written.
        rows, rejects: in the manifest and its rejects file.
        resumed: shards that were finished before this run.
        shards: in all.
    """

    out: str
    complete: bool
    rows: int = 0
    rejects: int = 0
    resumed: int = 0
    shards: int = 0


def rejects_path(out: str) -> str:
    """Return the rejects file of an output: clips.rejects.jsonl beside clips.parquet."""
    return f"{out.removesuffix('.parquet')}.rejects.jsonl"


def read_reasons(url: str) -> dict[tuple[str, float | None, float | None], str]:
    """Read which step rejected the clips of a rejects file, and why, by path, start and end."""
    rows = [json.loads(line) for line in files.read_text(url).split("\n") if line.strip()]
    return {
        (row["path"], row.get("start"), row.get("end")): f"{row['step']}: {row['reason']}"
        for row in rows
        if {"path", "step", "reason"} <= row.keys()
    }


def check_out(out: str, rows: Rows) -> None:
    """Check the name of the manifest that a step makes of `rows`.

    Raises:
        DataError: it does not end in .parquet, or is that of `rows`.
    """
    if urls.suffix(out) != ".parquet":
        raise DataError(f"{out}: expected a name ending in .parquet")
    one, other = (str(urls.local_path(url).resolve()) if urls.is_local(url) else url for url in (out, rows.url))
    if one == other:
        raise DataError(f"{out}: this is the manifest that is read; name another to write")


def run(
    step: Step,
    rows: Rows,
    out: str,
    executor: Executor,
    *,
    share: Share | None = None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Run a step over a manifest, and write `out` and its rejects.

    Args:
        step: what to do.
        rows: the manifest.
        out: the manifest to write, .parquet.
        executor: where to run; see `workers.executors`.
        share: which shards are this process's; all by default. Whoever finds all shards finished writes `out`.
        progress: called when a shard is finished, and at the start with what was finished before.

    Raises:
        DataError: shards failed (the others are kept); the disk is full; a process or a server was lost.
    """
    check_out(out, rows)
    schema = step.schema(rows.schema)
    names = [_part_name(step, number, shard) for number, shard in enumerate(rows.shards(step.shard_rows))]
    record = _record(step, names)
    if (done := _finished(out, record)) is not None:
        progress(rows.count, rows.count)
        return Outcome(out, True, done, _count_lines(rejects_path(out)), len(names), len(names))
    parts = f"{out}.parts"
    share = share or Share()
    mine = share.of(len(names))
    paths = _part_paths(parts, names)
    missing = {number for number in mine if not files.exists(paths[number])}
    resumed = len(mine) - len(missing)
    _run_missing(step, rows, schema, parts, paths, missing, executor, mine, progress)
    if not all(map(files.exists, paths)):
        return Outcome(out, False, resumed=resumed, shards=len(names))
    with resumable(parts):
        rejected = _join_rejects(paths, rejects_path(out))
        stamped = schema.with_metadata({RECORD: record})
        written = write_rows(out, _read_parts(paths), stamped)
    if share.world == 1:  # others may still be reading them
        _remove(parts)
    return Outcome(out, True, written, rejected, resumed, len(names))


def _run_missing(
    step: Step,
    rows: Rows,
    schema: pa.Schema,
    parts: str,
    paths: Sequence[str],
    missing: set[int],
    executor: Executor,
    mine: range,
    progress: Progress,
) -> None:
    """Run the shards that have no part yet, and write their parts."""
    size = step.shard_rows
    sizes = {number: min(size, rows.count - number * size) for number in mine}
    total = sum(sizes.values())
    done = total - sum(sizes[number] for number in missing)
    progress(done, total)
    if not missing:
        return

    def finish(number: int, result: Result) -> None:
        nonlocal done
        path = paths[number]
        with atomic.open_write(_rejects_part(path)) as file:
            file.writelines(files.json_line(reject) for reject in result.rejects)
        write_rows(path, iter([result.rows.cast(schema)]), schema)  # last: it says that both are there
        done += sizes[number]
        progress(done, total)

    shards = ((number, shard) for number, shard in enumerate(rows.shards(size)) if number in missing)
    run_shards(step, shards, executor, finish, total=len(paths), kept=parts)


def _remove(folder: str) -> None:
    fs, path = files.filesystem(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _part_name(step: Step, number: int, shard: pa.Table) -> str:
    """Return the name of a part: step, number, and a digest of everything that the shard's result depends on."""
    content = io.BytesIO()
    pq.write_table(shard.replace_schema_metadata(None), content, compression="none")
    about = json.dumps([VERSION, step.name, step.settings(), number], sort_keys=True)
    digest = hashlib.sha256(about.encode())
    digest.update(content.getbuffer())
    return f"{step.name}-{number:06d}-{digest.hexdigest()[:16]}.parquet"


def _part_paths(parts: str, names: Sequence[str]) -> list[str]:
    """Return where parts are: a thousand to a folder, or where an older version has put them, all into one."""
    before = set(listing.names(parts))
    return [
        urls.join(parts, name if name in before else f"{number // IN_FOLDER:04d}/{name}")
        for number, name in enumerate(names)
    ]


def _rejects_part(path: str) -> str:
    return path.removesuffix(".parquet") + ".rejects.jsonl"


def _record(step: Step, names: Sequence[str]) -> bytes:
    shards = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return json.dumps({"step": step.name, "settings": step.settings(), "shards": shards}, sort_keys=True).encode()


def _finished(out: str, record: bytes) -> int | None:
    """Return the number of rows of an output that these same shards made; None if there is none."""
    if not (files.exists(out) and files.exists(rejects_path(out))):
        return None
    with files.open_binary(out) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid:
            return None
        same = (parquet.schema_arrow.metadata or {}).get(RECORD) == record
        return int(parquet.metadata.num_rows) if same else None


def _read_parts(paths: Sequence[str]) -> Iterator[pa.Table]:
    for path in paths:
        with files.open_binary(path) as file:
            yield pq.read_table(file)


def _join_rejects(paths: Sequence[str], out: str) -> int:
    count = 0
    with atomic.open_write(out) as file:
        for path in paths:
            with files.open_binary(_rejects_part(path)) as part:
                data = part.read()
            count += data.count(b"\n")
            file.write(data)
    return count


def _count_lines(url: str) -> int:
    with files.open_binary(url) as file:
        return sum(1 for _ in file)
