"""Run a step over a manifest, shard by shard: in local processes, as one share of several, or on a Ray cluster.

A step is a pure function of a shard. A finished shard is a file in the folder `OUT.parts`, named by the step, its
settings and the shard's rows and written whole, so a run that was killed does no finished shard again, and the joined
manifest has the same bytes however the work was divided.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data import files, urls
from stdit_data.curation.executors import Executor, Result, Step
from stdit_data.curation.tables import Rows, write_rows
from stdit_data.errors import DataError, FileError, UserError

VERSION = 1  # of what the steps compute; another one makes finished shards outdated


RECORD = b"stdit.curation"  # key of an output's Parquet metadata


SHOWN = 3  # failures named in a message


logger = logging.getLogger(__name__)


Progress = Callable[[int, int], None]  # rows done and in all, of this process


class Unavailable(DataError):
    """Something that all remaining shards need is lost, such as a server: the run ends at once."""


@dataclass(frozen=True)
class Share:
    """The rank of this process among those that divide the shards."""

    rank: int = 0
    world: int = 1


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


def find_share() -> Share:
    """Return this process's share, from the environment of torchrun (RANK, WORLD_SIZE) or of a Slurm job array."""
    try:
        if "WORLD_SIZE" in os.environ:
            return Share(int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"]))
        if "SLURM_ARRAY_TASK_COUNT" in os.environ:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
            rank = (int(os.environ["SLURM_ARRAY_TASK_ID"]) - first) // step
            return Share(rank, int(os.environ["SLURM_ARRAY_TASK_COUNT"]))
    except (KeyError, ValueError) as error:
        raise DataError(f"RANK, WORLD_SIZE and SLURM_ARRAY_TASK_*: expected whole numbers ({error})") from None
    return Share()


def rejects_path(out: str) -> str:
    """Return the rejects file of an output: clips.rejects.jsonl beside clips.parquet."""
    return f"{out.removesuffix('.parquet')}.rejects.jsonl"


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
        executor: where to run; see `executors`.
        share: which shards are this process's; all by default. Whoever finds all shards finished writes `out`.
        progress: called when a shard is finished, and at the start with what was finished before.

    Raises:
        DataError: shards failed (the others are kept); the disk is full; a process or a server was lost.
    """
    if urls.suffix(out) != ".parquet":
        raise DataError(f"{out}: expected a name ending in .parquet")
    schema = step.schema(rows.schema)
    names = [_part_name(step, number, shard) for number, shard in enumerate(rows.shards(step.shard_rows))]
    record = _record(step, names)
    if (done := _finished(out, record)) is not None:
        progress(rows.count, rows.count)
        return Outcome(out, True, done, _count_lines(rejects_path(out)), len(names), len(names))
    parts = f"{out}.parts"
    work = _Work(step, schema, parts, names, executor, share or Share(), progress)
    work.run(rows)
    missing = [name for name in names if not files.exists(urls.join(parts, name))]
    if missing:
        return Outcome(out, False, resumed=work.resumed, shards=len(names))
    with _kept(parts):
        rejected = _join_rejects(parts, names, rejects_path(out))
        stamped = schema.with_metadata({RECORD: record})
        written = write_rows(out, _read_parts(parts, names), stamped)
    if work.share.world == 1:  # others may still be reading them
        _remove(parts)
    return Outcome(out, True, written, rejected, work.resumed, len(names))


class _Work:
    """This process's shards: finds the missing ones and runs them."""

    def __init__(
        self,
        step: Step,
        schema: pa.Schema,
        parts: str,
        names: Sequence[str],
        executor: Executor,
        share: Share,
        progress: Progress,
    ) -> None:
        if not 0 <= share.rank < share.world:
            raise DataError(f"process {share.rank} of {share.world}: expected a number from 0 to {share.world - 1}")
        self.step, self.schema, self.parts, self.names = step, schema, parts, names
        self.executor, self.share, self.progress = executor, share, progress
        self.mine = range(share.rank, len(names), share.world)
        self.missing = [number for number in self.mine if not files.exists(urls.join(parts, names[number]))]
        self.resumed = len(self.mine) - len(self.missing)
        self.failed: dict[int, str] = {}

    def run(self, rows: Rows) -> None:
        size = self.step.shard_rows
        sizes = {number: min(size, rows.count - number * size) for number in self.mine}
        total = sum(sizes.values())
        done = total - sum(sizes[number] for number in self.missing)
        self.progress(done, total)
        if not self.missing:
            return
        missing = set(self.missing)
        running: dict[Future[Result], int] = {}
        stopped: list[DataError] = []
        shards = ((number, shard) for number, shard in enumerate(rows.shards(size)) if number in missing)
        with self.executor.started(self.step) as submit:
            while True:
                while not stopped and len(running) < 2 * self.executor.width:
                    if (more := next(shards, None)) is None:
                        break
                    running[submit(more[1])] = more[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    try:
                        self._finish(number, future)
                    except DataError as error:  # no further shard is begun, and what is under way is still kept
                        stopped.append(error)
                        continue
                    done += sizes[number]
                    self.progress(done, total)
        if stopped:
            raise stopped[0]
        if self.failed:
            listed = "; ".join(f"shard {number}: {self.failed[number]}" for number in sorted(self.failed)[:SHOWN])
            more_failed = f"; and {len(self.failed) - SHOWN} more" if len(self.failed) > SHOWN else ""
            raise DataError(
                f"{len(self.failed)} of {len(self.names)} shards failed ({listed}{more_failed}); "
                f"the finished ones are kept in {self.parts}, the same command does the others"
            )

    def _finish(self, number: int, future: Future[Result]) -> None:
        """Writes a shard's part, or notes why there is none."""
        try:
            result = future.result()
        except Unavailable as error:
            raise Unavailable(
                f"{error}; finished shards are kept in {self.parts}; run the same command again to resume"
            ) from None
        except BrokenProcessPool:
            raise DataError(
                f"a worker process ended unexpectedly at {self.step.name} (out of memory?); finished shards are kept "
                f"in {self.parts}; run the same command again to resume; --workers sets the number of processes"
            ) from None
        except UserError as error:
            self.failed[number] = str(error)
            return
        except Exception as error:  # whatever it is, the other shards are still worth doing
            logger.debug("shard %d", number, exc_info=error)
            self.failed[number] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        path = urls.join(self.parts, self.names[number])
        with _kept(self.parts):
            with files.open_write(_rejects_part(path)) as file:
                file.writelines(files.json_line(reject) for reject in result.rejects)
            write_rows(path, iter([result.rows.cast(self.schema)]), self.schema)  # last: it says that both are there


@contextmanager
def _kept(parts: str) -> Iterator[None]:
    """Add to the error of a full or unwritable disk how to resume."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{error}; finished shards are kept in {parts}; run the same command again to resume") from None


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


def _read_parts(parts: str, names: Sequence[str]) -> Iterator[pa.Table]:
    for name in names:
        with files.open_binary(urls.join(parts, name)) as file:
            yield pq.read_table(file)


def _join_rejects(parts: str, names: Sequence[str], out: str) -> int:
    count = 0
    with files.open_write(out) as file:
        for name in names:
            with files.open_binary(_rejects_part(urls.join(parts, name))) as part:
                data = part.read()
            count += data.count(b"\n")
            file.write(data)
    return count


def _count_lines(url: str) -> int:
    with files.open_binary(url) as file:
        return sum(1 for _ in file)
