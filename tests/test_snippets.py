"""The pages' code from a prompt to a file runs as it stands, on the bundled demo model."""

import re
from pathlib import Path
from typing import Any

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
