"""The same bytes however the work is divided, and nothing finished is done twice or lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit_data.curation import engine
from stdit_data.curation.engine import Result, rejects_path, run
from stdit_data.curation.score import ScoreStep
from stdit_data.curation.tables import Rows, open_rows, with_columns
from stdit_data.errors import DataError, FileError
from stdit_data.workers.executors import Inline, Processes, RayCluster
from stdit_data.workers.work import Share, Unavailable, find_share


@dataclass(frozen=True)
class Double:
    """Doubles a column, rejects thirteens, and notes each call in a folder."""

    notes: str = ""
    lost_at: int = -1
    fails_at: int = -1
    shard_rows: int = 4

    name = "double"
    gpus = 0.0
    has_model = False

    def settings(self) -> dict[str, Any]:
        return {"factor": 2}

    def schema(self, given: pa.Schema) -> pa.Schema:
        return with_columns(given, {"double": pa.int64()})

    def open(self) -> None:
        return None

    def run(self, shard: pa.Table, opened: None) -> Result:
        values = shard.column("value").to_pylist()
        if self.lost_at in values:
            raise Unavailable("the server is gone")
        if self.fails_at in values:
            raise RuntimeError("a bug")
        if self.notes:
            (Path(self.notes) / f"{values[0]}-{time.monotonic_ns()}").touch()
        rows = [row | {"double": 2 * row["value"]} for row in shard.to_pylist() if row["value"] != 13]
        rejects = [{"path": f"/{value}", "reason": "unlucky"} for value in values if value == 13]
        return Result(pa.Table.from_pylist(rows, self.schema(shard.schema)), rejects)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    table = pa.table({"path": [f"/{number}.mp4" for number in range(30)], "value": list(range(30))})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    return open_rows(str(tmp_path / "in.parquet"))


def digest(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), Path(rejects_path(str(out))).read_bytes()


def test_a_step_runs_shard_by_shard(rows: Rows, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    outcome = run(Double(), rows, str(tmp_path / "out.parquet"), Inline(), progress=lambda *at: seen.append(at))
    assert (outcome.rows, outcome.rejects, outcome.shards, outcome.resumed) == (29, 1, 8, 0)
    assert seen[0] == (0, 30)
    assert seen[-1] == (30, 30)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("double").to_pylist() == [2 * value for value in range(30) if value != 13]
    (reject,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject) == {"path": "/13", "reason": "unlucky"}
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_finished_output_is_not_made_again(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    run(Double(), rows, str(out), Inline())
    before = digest(out)
    outcome = run(Double(lost_at=0), rows, str(out), Inline())
    assert (outcome.rows, outcome.rejects, outcome.resumed) == (29, 1, 8)
    assert digest(out) == before


def test_only_what_changed_is_done_again(rows: Rows, tmp_path: Path) -> None:
    out, notes = tmp_path / "out.parquet", tmp_path / "notes"
    notes.mkdir()
    with pytest.raises(DataError, match="1 of 8 shards failed"):
        run(Double(fails_at=29), rows, str(out), Inline())
    changed = pq.read_table(tmp_path / "in.parquet").to_pydict()
    changed["value"][5] = 500  # in the second shard
    pq.write_table(pa.table(changed), tmp_path / "in.parquet")
    outcome = run(Double(notes=str(notes)), open_rows(str(tmp_path / "in.parquet")), str(out), Inline())
    assert sorted(name.name.split("-")[0] for name in notes.iterdir()) == ["28", "4"]
    assert outcome.resumed == 6


def test_failures_are_named_and_the_rest_is_kept(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(DataError, match=r"1 of 8 shards failed \(shard 2: RuntimeError: a bug\); the finished ones"):
        run(Double(fails_at=9), rows, str(out), Inline())
    assert not out.exists()
    assert len(list(Path(f"{out}.parts").glob("*/*.parquet"))) == 7


def test_parts_lie_in_folders_of_a_thousand_and_those_of_an_older_version_in_one(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    run(Double(), rows, str(out), Inline())
    wanted = digest(out)
    out.unlink()
    monkeypatch.setattr(engine, "IN_FOLDER", 3)
    with pytest.raises(DataError, match="1 of 8 shards failed"):
        run(Double(fails_at=9), rows, str(out), Inline())
    assert [len(list((parts / name).glob("*.parquet"))) for name in ("0000", "0001", "0002")] == [2, 3, 2]
    for part in parts.glob("0000/*"):
        part.rename(parts / part.name)
    assert run(Double(), rows, str(out), Inline()).resumed == 7
    assert digest(out) == wanted
    assert not parts.exists()


def test_a_lost_server_ends_the_run_at_once(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(Unavailable, match="the server is gone; finished shards are kept"):
        run(Double(lost_at=9), rows, str(out), Inline())
    assert len(list(Path(f"{out}.parts").glob("*/*.parquet"))) == 2
    assert run(Double(), rows, str(out), Inline()).resumed == 2


def test_a_full_disk_ends_in_one_line(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.parquet"
    write = engine.write_rows

    def fill(url: str, *rest: Any) -> int:
        if "-000003-" in url:
            raise FileError(f"{url}: No space left on device")
        return write(url, *rest)

    monkeypatch.setattr(engine, "write_rows", fill)
    with pytest.raises(
        FileError, match=r"No space left on device; finished shards are kept in .*; run the same command"
    ):
        run(Double(), rows, str(out), Inline())
    monkeypatch.setattr(engine, "write_rows", write)
    assert run(Double(), rows, str(out), Inline()).resumed == 3


def engine_names(rows: Rows) -> list[str]:
    return [engine._part_name(Double(), number, shard) for number, shard in enumerate(rows.shards(4))]


def test_shards_do_not_depend_on_row_groups(rows: Rows, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(tmp_path / "in.parquet"), tmp_path / "whole.parquet")
    assert engine_names(open_rows(str(tmp_path / "whole.parquet"))) == engine_names(rows)


def test_processes_divide_the_shards(rows: Rows, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    run(Double(), rows, str(alone), Inline())
    assert not run(Double(), rows, str(shared), Inline(), share=Share(1, 3)).complete
    assert not run(Double(), rows, str(shared), Inline(), share=Share(2, 3)).complete
    assert run(Double(), rows, str(shared), Inline(), share=Share(0, 3)).complete
    assert digest(alone) == digest(shared)


def test_the_share_comes_from_torchrun_or_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_share() == Share(0, 1)
    for name, value in (("COUNT", 4), ("MIN", 10), ("STEP", 5), ("ID", 20)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert find_share() == Share(2, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert find_share() == Share(1, 2)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(DataError, match="whole numbers"):
        find_share()


@pytest.fixture(scope="session")
def scored(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "one.parquet"
    run(ScoreStep(shard_rows=2), open_rows(str(raw)), str(out), Inline())
    return out


def test_three_processes_write_the_same_bytes(raw: Path, scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "three.parquet"
    run(ScoreStep(shard_rows=2), open_rows(str(raw)), str(out), Processes(3))
    assert digest(out) == digest(scored)


KILLED = """
import sys, time
from pathlib import Path
from stdit_data.curation.engine import run
from stdit_data.workers.executors import Inline
from stdit_data.curation.score import ScoreStep
from stdit_data.curation.tables import open_rows

def tell(done, total):
    print(done, flush=True)

run(ScoreStep(shard_rows=2), open_rows(sys.argv[1]), sys.argv[2], Inline(), progress=tell)
"""


def test_killed_and_started_again(raw: Path, scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed.parquet"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(raw), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 4:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not out.exists()
    finished = len(list(Path(f"{out}.parts").glob("*/*.parquet")))
    assert finished >= 2
    outcome = run(ScoreStep(shard_rows=2), open_rows(str(raw)), str(out), Inline())
    assert outcome.resumed == finished
    assert digest(out) == digest(scored)


@pytest.mark.slow
def test_ray_writes_the_same_bytes(raw: Path, scored: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:  # not imported here: it reads its environment when it is, see RayCluster
        pytest.skip("Ray is not installed")
    out = tmp_path / "ray.parquet"
    outcome = run(ScoreStep(shard_rows=2), open_rows(str(raw)), str(out), RayCluster("local", 2))
    assert outcome.complete
    assert digest(out) == digest(scored)
