"""The pages name only what exists: linked files, paths in code spans, dotted names of the packages."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "packages/*/README.md", "packages/*/src/**/*.md")
    for page in ROOT.glob(pattern)
)
SOURCES = [ROOT, *(ROOT / "packages").glob("*/src"), *(ROOT / "packages").glob("*/src/stdit_*")]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]*[\w-]+\.(?:py|toml|md|sh|cff)")
FOLDER = re.compile(r"(?:packages|tests|docs|benchmarks)(?:/[\w-]+)*/?")
DOTTED = re.compile(r"stdit_(?:model|data|train|cli)(?:\.\w+)+")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
MADE_BY_THE_READER = {"packages/stdit-train/src/stdit_train/config/stages/half.toml"}  # docs/extending.md adds it


def exists(path: str, page: Path) -> bool:
    return any((folder / path).exists() for folder in (page.parent, *SOURCES))


def missing_paths(page: Path) -> Iterator[str]:
    text = page.read_text()
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists():
            yield link
    for span in SPAN.findall(FENCE.sub("", text)):
        is_path = (FILE.fullmatch(span) and "/" in span) or FOLDER.fullmatch(span)
        if is_path and span not in MADE_BY_THE_READER and not exists(span, page):
            yield span


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute that can be reached from one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_what_exists(page: Path) -> None:
    assert sorted(set(missing_paths(page))) == []
    names = {name for span in SPAN.findall(page.read_text()) for name in DOTTED.findall(span)}
    assert [name for name in sorted(names) if not resolves(name)] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (file, name)
        for file in sorted((ROOT / "packages").rglob("src/**/*.py"))
        for name in sorted({name for span in SPAN.findall(file.read_text()) for name in DOTTED.findall(span)})
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_docstrings_name_what_exists(source: Path, name: str) -> None:
    assert resolves(name), f"{source.relative_to(ROOT)}: `{name}`"


def test_a_wrong_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](none.md) `packages/none` `docs/none.md` `stdit_model.model.STDiT` [b](https://example.org)\n")
    assert list(missing_paths(page)) == ["none.md", "packages/none", "docs/none.md"]
    assert resolves("stdit_model.model.STDiT")
    assert not resolves("stdit_model.model.Nothing")
    assert not resolves("stdit_model.none")
