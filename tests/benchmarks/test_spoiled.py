"""benchmarks/findings/spoiled.py: the clips that it spoils, and the precision and recall that it counts."""

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "findings"


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("cv2")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import spoiled

    return spoiled


def test_clips_are_spoiled_as_the_manifest_says(spoiled: ModuleType, tmp_path: Path) -> None:
    manifest = spoiled.write_clips(tmp_path, 20)
    rows = pq.read_table(manifest).to_pylist()
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"clean": 8, "static": 4, "wrong caption": 4, "duplicate": 2, "blurred": 1, "letterboxed": 1}
    by_path = {row["path"]: row for row in rows}
    dataset, scenes = spoiled.moving_clips("train", 20)
    for row in rows:
        right = dataset.caption(scenes[int(row["copy_of"][:5])])
        assert (row["caption"] != right) == (row["kind"] == "wrong caption")
        assert (row["path"] != row["copy_of"]) == (row["kind"] == "duplicate")
        assert by_path[row["copy_of"]]["kind"] in ("clean", row["kind"])
    spoiled.caption_truly(manifest, 20, tmp_path / "captioned.parquet")
    for row, true in zip(rows, pq.read_table(tmp_path / "captioned.parquet").to_pylist(), strict=True):
        assert true == row | {"caption": dataset.caption(scenes[int(row["copy_of"][:5])])}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    spoiled.write_clips(tmp_path, 20)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")} == stamps


def test_what_is_done_to_a_clip(spoiled: ModuleType) -> None:
    video = torch.rand(3, 4, 96, 96, generator=torch.Generator().manual_seed(0))
    assert spoiled.spoil(video, "clean") is video
    static = spoiled.spoil(video, "static")
    assert static.shape == video.shape and torch.equal(static[:, 3], video[:, 0])
    barred = spoiled.spoil(video, "letterboxed")
    assert (barred[..., :14, :] == -1).all() and (barred[..., -14:, :] == -1).all()
    assert torch.equal(barred[..., 14:-14, :], video[..., 14:-14, :])
    assert spoiled.spoil(video, "blurred").std() < 0.3 * video.std()


def test_precision_and_recall(spoiled: ModuleType, tmp_path: Path) -> None:
    kinds = ["clean", "clean", "static", "static", "duplicate", "duplicate", "wrong caption", "blurred", "letterboxed"]
    copies = [0, 1, 2, 3, 0, 1, 6, 7, 8]
    rows = [
        {"path": f"{i}.mp4", "kind": kind, "copy_of": f"{copy}.mp4"}
        for i, (kind, copy) in enumerate(zip(kinds, copies, strict=True))
    ]
    manifest = tmp_path / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    by_filter = {2: "frozen_share", 1: "motion", 8: "letterbox", 6: "sharpness", 7: "sharpness"}
    by_dedup = {0: "looks the same as /4.mp4, 0 to 2 s", 3: "looks the same as /5.mp4, 0 to 2 s"}
    for step, rejects in (
        ("filter", [{"path": f"/{i}.mp4", "column": column} for i, column in by_filter.items()]),
        ("dedup", [{"path": f"/{i}.mp4", "reason": reason} for i, reason in by_dedup.items()]),
    ):
        (tmp_path / f"{step}.rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    lines = spoiled.tables(manifest, {step: tmp_path / f"{step}.parquet" for step in ("filter", "dedup")})
    assert "| clean | 2 |  |  | 1 |  | 1 |  |" in lines  # frozen_share, letterbox, motion, sharpness, dedup, kept
    assert "| static | motion, frozen_share | 2 | 1 | 0.50 | 0.50 |" in lines
    assert "| blurred | sharpness | 2 | 1 | 0.50 | 1.00 |" in lines
    assert "| letterboxed | letterbox | 1 | 1 | 1.00 | 1.00 |" in lines
    assert "| duplicate | dedup | 2 | 1 | 0.50 | 0.50 |" in lines
    assert "| wrong caption | no step | 0 | 0 | - | 0.00 |" in lines
    assert "| any of them | all steps | 7 | 6 | 0.86 | 0.86 |" in lines
