"""`stdit data validate`, `preview` and `convert`, where the command line is installed too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stdit_data import preview as previews
from stdit_data.errors import DataError
from stdit_data.manifests.format import read_manifest

pytest.importorskip("stdit_cli", reason="the command line is another package")

from typer.testing import CliRunner

from stdit_cli.commands.data import app


@pytest.fixture(scope="module")
def clips(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clips")
    for number in range(3):
        encode_clip(place / f"v_YoYo_g0{number}_c01.mp4", frames=50 + number)
        (place / f"v_YoYo_g0{number}_c01.txt").write_text(f"caption {number}")
    return place


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_validate(clips: Path, tmp_path: Path) -> None:
    code, output = run("validate", clips, "--report", tmp_path / "all.jsonl", "--write", tmp_path / "good.parquet")
    assert code == 0
    assert "entries with problems │ 0" in output
    assert "h264 (3)" in output
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 3
    assert [entry.num_frames for entry in read_manifest(str(tmp_path / "good.parquet")).entries] == [50, 51, 52]


def test_validate_finds_what_is_wrong(clips: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "set.csv"
    manifest.write_text(
        f"path,caption\n{clips}/v_YoYo_g00_c01.mp4,\nmissing.mp4,gone\n{clips}/v_YoYo_g01_c01.mp4,good\n"
    )
    code, output = run("validate", manifest, "--show", 1)
    assert code == 1
    assert "0: " in output
    assert "no caption (column 'caption' is empty)" in output
    assert "and 1 more" in output
    for command in ("validate", "preview"):
        with pytest.raises(DataError, match="leads out of"):
            run(command, manifest, "--confine")
    code, output = run("validate", clips, "--frames", 64)
    assert code == 1
    assert "too short: 50 frames, 127 needed for 64 frames at interval 2" in output


def test_a_wrong_column_name_says_which_were_found(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("video_file,caption\na.mp4,hi\n")
    with pytest.raises(DataError, match="no column 'path'; found video_file, caption"):
        run("validate", tmp_path / "set.csv")


def test_preview(clips: Path, tmp_path: Path) -> None:
    code, output = run("preview", clips, "--out", tmp_path / "look", "--height", 64, "--width", 64, "--samples", 2)
    assert code == 0
    assert output.split() == [f"{tmp_path}/look.png", f"{tmp_path}/look.mp4"]
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    assert b"ftyp" in (tmp_path / "look.mp4").read_bytes()[:16]


def test_rejects_are_shown_with_their_reasons(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(map(str, clips.glob("*.mp4")))
    rows = [
        {"path": path, "start": 0.0, "end": 0.5 + i, "step": "filter", "reason": f"not\u2028{i}"}
        for i, path in enumerate(paths)
    ]
    (tmp_path / "set.rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: list[Any] = []
    monkeypatch.setattr(
        previews, "contact_sheet", lambda *_, details, **__: drawn.extend(details) or Image.new("RGB", (8, 8))
    )
    options = ("--height", 64, "--width", 64, "--frames", 2, "--interval", 1)
    assert run("preview", tmp_path / "set.rejects.jsonl", "--out", tmp_path / "look", *options)[0] == 0
    assert drawn == [f"filter: not\u2028{i}" for i in range(len(paths))]


def test_shapes(tmp_path: Path) -> None:
    code, output = run("validate", "shapes:val")
    assert code == 0
    assert "ShapesDataset (64)" in output
    assert run("preview", "shapes", "--out", tmp_path / "look", "--height", 64, "--width", 64)[0] == 0
    with pytest.raises(DataError, match="unknown split 'test' of shapes"):
        run("validate", "shapes:test")


def test_convert(clips: Path, tmp_path: Path) -> None:
    code, output = run("convert", "ucf101", clips, tmp_path / "set.csv")
    assert code == 0
    assert "3 entries" in output
    assert read_manifest(str(tmp_path / "set.csv")).entries[0].caption == "yo yo"
    code, output = run("convert", "pexels", clips, tmp_path / "set.jsonl")
    assert code == 0
    assert read_manifest(str(tmp_path / "set.jsonl")).entries[2].caption == "caption 2"
    scenes = [{"caption": "a", "scene_cut": [0, 20]}, {"caption": "b"}]
    meta = {"x": {"clip": {"v_YoYo_g00_c01.mp4": {"scene_split": scenes}}}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    code, output = run("convert", "hdvg", tmp_path / "meta.json", tmp_path / "set.parquet", "--videos", clips)
    assert code == 0
    assert "left out: 1 x key 'scene_cut' missing" in output
    assert run("validate", tmp_path / "set.parquet")[0] == 0
