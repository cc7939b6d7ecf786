"""The pages' code from a prompt to a file runs as it stands, on the bundled demo model."""

import re
from pathlib import Path

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
