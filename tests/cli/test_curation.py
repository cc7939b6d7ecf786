"""`stdit data cut`, `score`, `filter` and `dedup` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stdit_data.manifests.format import read_manifest
from stdit_data.video.write import write_mp4


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A clip of two seconds, its copy, and a broken one."""
    folder = tmp_path / "clips"
    folder.mkdir()
    t = torch.linspace(-1, 1, 48)[None, :, None, None]
    picture = torch.rand(3, 1, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for name in ("a.mp4", "copy.mp4"):
        write_mp4(folder / name, (picture + 0.2 * t).clamp(-1, 1), 24)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Four rows of files that are not there, with scores."""
    rows = {"path": [f"/none/{i}.mp4" for i in range(4)], "motion": [0.0, 1.0, 2.0, 3.0], "sharpness": [9.0] * 4}
    pq.write_table(pa.table(rows), tmp_path / "scored.parquet")
    return tmp_path / "scored.parquet"


def test_from_raw_videos_to_clips_without_duplicates(stdit: Callable, clips: Path, tmp_path: Path) -> None:
    done = stdit("data", "cut", "clips", "cut.parquet", "--min", "0.5", "--processes", "1")
    assert done.code == 0, done
    assert done.out.endswith(
        "cut.parquet: 2 rows; 1 rejected, see cut.rejects.jsonl\n"
    )  # on a slow machine progress first
    done = stdit("data", "score", "cut.parquet", "scored.parquet", "--processes", "1")
    assert done.out.endswith("scored.parquet: 2 rows\n")
    keep = "duration > 1 and sharpness >= q0"
    done = stdit("data", "filter", "scored.parquet", "kept.parquet", "--keep", keep, "--report", "page.html")
    assert done.out.endswith("page.html\n")
    assert pq.read_metadata("kept.parquet").num_rows == 2
    assert "2 of 2 clips kept" in (tmp_path / "page.html").read_text()
    done = stdit("data", "dedup", "kept.parquet", "clips.parquet", "--processes", "1")
    assert done.out.endswith("clips.parquet: 1 rows; 1 rejected, see clips.rejects.jsonl\n")
    (entry,) = read_manifest(str(tmp_path / "clips.parquet")).entries
    assert entry.path == str(clips / "a.mp4")
    again = stdit("data", "dedup", "kept.parquet", "clips.parquet", "--processes", "1")
    assert again.out.endswith("see clips.rejects.jsonl (1 of 1 shards were already done)\n")


def test_filter_by_condition_and_preset_together(stdit: Callable, scored: Path, tmp_path: Path) -> None:
    done = stdit(
        *("data", "filter", "scored.parquet", "kept.parquet"),
        *("--keep", "motion < 2.5 or motion > 100", "--preset", "basic", "--partly"),
    )
    assert done.out == "kept.parquet: 2 rows; 2 rejected, see kept.rejects.jsonl\n", done
    rejects = [json.loads(line) for line in (tmp_path / "kept.rejects.jsonl").read_text().splitlines()]
    assert [reject["path"] for reject in rejects] == ["/none/0.mp4", "/none/3.mp4"]
    assert rejects[1]["reason"] == "not (motion < 2.5 or motion > 100)"
    assert pq.read_table("kept.parquet")["motion"].to_pylist() == [1.0, 2.0]


def test_presets_are_listed_with_their_sources(stdit: Callable, scored: Path) -> None:
    done = stdit("data", "filter", "scored.parquet", "kept.parquet", "--preset", "list")
    assert done.code == 0
    assert "basic: Plain defects" in done.out
    assert "  sharpness >= 5    this project" in done.out
    assert not Path("kept.parquet").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to filter by: give --keep or --preset (or both)"),
        (["--keep", "motoin > 1"], "unknown column 'motoin' in 'motoin > 1'; did you mean 'motion'? columns: path,"),
        (["--keep", "motion >"], "condition 'motion >': invalid syntax"),
        (
            ["--keep", "motion > 1) or (motion < 3", "--preset", "basic", "--partly"],
            "condition 'motion > 1) or (motion",
        ),
        (["--preset", "basics"], "no preset 'basics'; there are basic,"),
        (["--preset", "basic"], "preset basic needs columns that the manifest lacks: black_share (for black_share"),
    ],
)
def test_mistakes_are_one_line(stdit: Callable, scored: Path, options: list[str], said: str) -> None:
    done = stdit("data", "filter", "scored.parquet", "kept.parquet", *options)
    assert done.code == 2, done
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not Path("kept.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["filter", "scored.parquet", "kept.csv", "--keep", "motion > 1"],
            "kept.csv: expected a name ending in .parquet",
        ),
        (["dedup", "scored.parquet", "kept.csv"], "kept.csv: expected a name ending in .par"),
        (["filter", "scored.parquet", "./scored.parquet", "--keep", "motion > 1"], "this is the manifest that is read"),
        (["dedup", "scored.parquet", "scored.parquet"], "this is the manifest that is read; name another to write"),
        (["dedup", "scored.parquet", "kept.parquet", "--fps=-1"], "fps -1: expected a rate above 0"),
        (["dedup", "scored.parquet", "kept.parquet", "--fps", "nan"], "fps nan: expected a rate above 0"),
    ],
)
def test_outputs_and_rates_that_cannot_be(stdit: Callable, scored: Path, arguments: list[str], said: str) -> None:
    before = Path("scored.parquet").read_bytes()
    done = stdit("data", *arguments)
    assert done.code == 2, done
    assert said in done.err
    assert done.err.count("\n") == 1
    assert Path("scored.parquet").read_bytes() == before
    assert not list(Path().glob("kept*"))
