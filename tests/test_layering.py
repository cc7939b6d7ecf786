"""The one-way street between the packages, read from the source's imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
MAY_IMPORT = {
    "stdit_model": set(),
    "stdit_data": set(),
    "stdit_train": {"stdit_model", "stdit_data"},
    "stdit_cli": {"stdit_model", "stdit_data", "stdit_train"},
}


def imported(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = list((PACKAGES / package.replace("_", "-") / "src" / package).rglob("*.py"))
    assert files
    for file in files:
        siblings = {name for name in imported(file) if name.startswith("stdit_")}
        assert siblings <= MAY_IMPORT[package] | {package}, file


def test_the_model_knows_nothing_of_processes() -> None:
    for file in (PACKAGES / "stdit-model" / "src").rglob("*.py"):
        assert "torch.distributed" not in file.read_text(), file


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_package_is_typed_and_documented(package: str) -> None:
    root = PACKAGES / package.replace("_", "-")
    assert (root / "src" / package / "py.typed").exists()
    for name in ("README.md", "CHANGELOG.md"):
        assert len((root / name).read_text().split()) > 3, name
