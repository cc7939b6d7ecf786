"""The README's example runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "stdit-data" / "README.md"


def test_example(
    encode_clip: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        encode_clip(tmp_path / "clips" / f"{number}.mp4", frames=50)
        (tmp_path / "clips" / f"{number}.txt").write_text(f"caption {number}")
    monkeypatch.chdir(tmp_path)
    code, writing = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    exec(writing, {})
    assert (tmp_path / "noise.mp4").stat().st_size > 1000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("torch.Size([4, 3, 16, 256, 256])" in line for line in lines)
