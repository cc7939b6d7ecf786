"""The pages' code from a prompt to a file runs as it stands, on the bundled demo model."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from stdit_data.video.probe import probe

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/sampling.md", "packages/stdit-model/README.md", "packages/stdit-train/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_from_a_prompt_to_a_file(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "export_video" in block]
    exec(code, {})
    written = probe("circle.mp4")
    assert (written.frames, written.width, written.height, written.fps) == (16, 64, 64, 8.0)
    if page == "docs/sampling.md":
        assert Image.open("first.png").size == (64, 64)
        assert Image.open("longer.gif").n_frames == 24


def test_the_page_on_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets in their order, each a part of one program."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/diffusers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 12
    program: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        program.pop("video", None)
        exec(compile(block, f"snippet {number}", "exec"), program)
        if "video = " in block:
            video = program["video"]
            assert video.shape == (1, 3, 24 if "window" in block else 16, 64, 64), number
            assert video.isfinite().all(), number
    assert Image.open("square.png").size == (64, 64)
    assert program["latents"].shape[0] == 2
    assert all(parameter.grad is not None for parameter in program["model"].parameters())
    assert program["again"].config.num_frames == 16


@pytest.mark.slow
def test_the_folder_from_raw_videos_to_a_cache(stdit: Callable, tmp_path: Path) -> None:
    """Its script and its commands, which print what the page says."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    commands = re.findall(r"^ {4}\$ (stdit .*)\n((?: {4}[^$].*\n)*)", page, re.MULTILINE)
    assert len(commands) == 8
    for command, expected in commands:
        done = stdit(*shlex.split(command)[1:])
        assert done.code == 0, (command, done)
        printed = [" ".join(line.split()) for line in done.out.splitlines()]
        assert [line for line in map(str.strip, expected.splitlines()) if line not in printed] == [], done

    def rejected(file: str) -> dict[str, Any]:
        return {Path(row["path"]).name: row for row in map(json.loads, Path(file).read_text().splitlines())}

    assert sorted(rejected("kept.rejects.jsonl")) == ["letterbox.mp4", "soft.mp4", "still.mp4"]
    soft = rejected("kept.rejects.jsonl")["soft.mp4"]
    assert (soft["column"], soft["limit"], round(soft["value"], 2)) == ("sharpness", 5.0, 2.08)
    assert list(rejected("set.rejects.jsonl")) == ["copy.mp4"]
    scores = {Path(row["path"]).name: row["sharpness"] for row in pq.read_table("score.parquet").to_pylist()}
    assert (round(scores["a.mp4"], 1), round(scores["copy.mp4"], 1)) == (121.4, 117.3)
    assert stdit("data", "preview", "kept.rejects.jsonl", "--interval", "1").code == 0
    assert stdit("data", "curate", "raw", "all.parquet").code == 0
    names = ["path", "start", "end"]
    assert pq.read_table("all.parquet", columns=names).equals(pq.read_table("set.parquet", columns=names))
