"""The README's example runs as it stands, with fewer steps."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "stdit-train" / "README.md"


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    short = code.replace('"steps": 200, "sampling.steps": 20', '"steps": 2, "sampling.steps": 2, "data.clips": 8')
    assert short != code
    names: dict = {}
    exec(short, names)
    assert names["video"].shape == (3, 16, 64, 64)
    assert names["trainer"].step == 2


def test_the_table_names_what_exists() -> None:
    rows = re.findall(r"^\| (`.+?) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    package = README.parent / "src" / "stdit_train"
    assert all((package / name).exists() for name in named), named
    folders = {path.name + "/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= named
