"""Who may import whom: packages one way, folders one way, files in no circle. Read from the source's imports.

Imports inside functions and under `TYPE_CHECKING` count like those at the top of a file.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
PACKAGES_MAY_IMPORT = {
    "stdit_model": set(),
    "stdit_data": set(),
    "stdit_train": {"stdit_model", "stdit_data"},
    "stdit_cli": {"stdit_model", "stdit_data", "stdit_train"},
}
# Which folders and files of a package a folder (or a file beside the folders) may import, besides its own files.
# A line may name only what stands above it.
FOLDERS_MAY_IMPORT: dict[str, dict[str, set[str]]] = {
    "stdit_model": {
        "errors": set(),
        "layers": set(),
        "protocols": set(),
        "tables": set(),
        "diffusion": {"tables"},
        "embed": {"layers", "tables"},
        "presets": {"errors"},
        "text": {"protocols"},
        "causal_vae": {"errors"},
        "video_vae": {"causal_vae", "errors", "protocols"},
        "blocks": {"errors", "layers", "presets"},
        "weights": {"embed", "errors"},
        "model": {"blocks", "embed", "errors", "layers", "presets", "weights"},
        "convert": {"embed", "errors", "model", "presets", "weights"},
        "flops": {"blocks", "embed", "model"},
        "sampling": {
            "causal_vae",
            "convert",
            "diffusion",
            "errors",
            "layers",
            "model",
            "protocols",
            "text",
            "video_vae",
            "weights",
        },
    },
    "stdit_data": {
        "errors": set(),
        "transforms": {"errors"},
        "buckets": {"errors"},
        "bucket_column": {"buckets"},
        "storage": {"errors"},
        "clip": {"buckets"},
        "video": {"errors", "storage", "transforms"},
        "loading": {"bucket_column", "buckets", "clip", "errors", "storage", "transforms"},
        "manifests": {"bucket_column", "buckets", "clip", "errors", "storage", "video"},
        "labels": set(),
        "preview": {"clip", "errors", "labels", "storage", "transforms", "video"},
        "workers": {"errors"},
        "curation": {"errors", "manifests", "storage", "video", "workers"},
        "datasets": {"bucket_column", "buckets", "clip", "errors", "manifests", "storage", "transforms", "video"},
        "latents": {"buckets", "clip", "errors", "loading", "storage", "transforms", "workers"},
    },
    "stdit_train": {
        "assets": set(),
        "callbacks": set(),
        "errors": set(),
        "garbage": set(),
        "hardware": set(),
        "interrupts": set(),
        "versions": set(),
        "config": {"assets", "errors"},
        "distributed": {"config", "errors", "hardware"},
        "data": {"config", "distributed", "errors"},
        "optim": {"config"},
        "checkpoint": {"config", "distributed", "errors"},
        "components": {"assets", "config", "data", "distributed", "errors", "hardware"},
        "adapters": {"assets", "checkpoint", "components", "config", "distributed", "errors"},
        "evaluation": {"components", "errors"},
        "loss": {"components", "config", "data", "distributed", "hardware", "optim"},
        "pipeline": {
            "adapters",
            "assets",
            "checkpoint",
            "components",
            "config",
            "distributed",
            "errors",
            "hardware",
        },
        "tracking": {"checkpoint", "config", "hardware", "versions"},
        "demo": {"config", "evaluation"},
        "report": {"checkpoint", "config", "errors", "tracking"},
        "task": {
            "adapters",
            "checkpoint",
            "components",
            "config",
            "distributed",
            "loss",
            "optim",
            "pipeline",
            "tracking",
        },
        "vae": {
            "checkpoint",
            "components",
            "config",
            "data",
            "distributed",
            "errors",
            "evaluation",
            "hardware",
            "loss",
            "optim",
            "task",
            "tracking",
        },
        "estimate": {
            "adapters",
            "assets",
            "components",
            "config",
            "distributed",
            "errors",
            "hardware",
            "optim",
            "vae",
            "versions",
        },
        "outputs": {"checkpoint", "config", "distributed", "report", "task", "tracking"},
        "trainer": {
            "callbacks",
            "checkpoint",
            "config",
            "data",
            "distributed",
            "errors",
            "garbage",
            "hardware",
            "interrupts",
            "optim",
            "outputs",
            "task",
            "tracking",
        },
        "ablation": {
            "callbacks",
            "checkpoint",
            "components",
            "config",
            "data",
            "distributed",
            "errors",
            "estimate",
            "evaluation",
            "hardware",
            "pipeline",
            "report",
            "task",
            "tracking",
            "trainer",
        },
        "build": {
            "adapters",
            "assets",
            "callbacks",
            "checkpoint",
            "components",
            "config",
            "data",
            "distributed",
            "errors",
            "hardware",
            "task",
            "tracking",
            "trainer",
            "vae",
        },
        "curriculum": {"build", "callbacks", "checkpoint", "components", "config", "distributed", "errors"},
    },
    "stdit_cli": {
        "completion": set(),
        "console": set(),
        "settings": set(),
        "workers": {"console"},
        "commands": {"completion", "console", "settings", "workers"},
        "lazy": set(),
        "main": {"lazy", "settings"},
        "__main__": {"main"},
    },
}
MOST_FILES = 13  # in one folder


@cache
def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name; a package by the name of its folder."""
    found = {}
    for name in PACKAGES_MAY_IMPORT:
        source = PACKAGES / name.replace("_", "-") / "src"
        for file in sorted(source.rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module}: import by the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in names}
    return frozenset(name for name in found if name in modules() and name != module)


def folder(module: str) -> str:
    """What the table calls a module: its folder, or itself where it lies beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def circles(graph: dict[str, frozenset[str]]) -> Iterator[list[str]]:
    """One circle for each module that is its own descendant, as a path."""
    for start in graph:
        before: dict[str, str] = {}
        queue = [start]
        while queue:
            module = queue.pop(0)
            for name in sorted(graph.get(module, ())):
                if name == start:
                    path = [start, module]
                    while path[-1] != start:
                        path.append(before[path[-1]])
                    yield path[::-1]
                    queue.clear()
                    break
                if name not in before:
                    before[name] = module
                    queue.append(name)


@pytest.mark.parametrize("package", PACKAGES_MAY_IMPORT)
def test_packages_import_one_way(package: str) -> None:
    own = [module for module in modules() if module.split(".")[0] == package]
    assert own
    for module in own:
        siblings = {name.split(".")[0] for name in imports(module)} - {package}
        assert siblings <= PACKAGES_MAY_IMPORT[package], module


@pytest.mark.parametrize("package", PACKAGES_MAY_IMPORT)
def test_folders_import_one_way(package: str) -> None:
    allowed = FOLDERS_MAY_IMPORT[package]
    above: set[str] = set()
    for name, names in allowed.items():
        assert names <= above, f"{package}: {name} may import {names - above}, which stand below it in the table"
        above.add(name)
    used: dict[str, set[str]] = {name: set() for name in allowed}
    for module in modules():
        if module.split(".")[0] == package and module != package:
            others = {folder(name) for name in imports(module) if name.split(".")[0] == package}
            others -= {folder(module), ""}
            assert folder(module) in allowed, f"{module}: say in the table what {folder(module)} may import"
            assert others <= allowed[folder(module)], module
            used[folder(module)] |= others
    assert used == allowed, "the table allows more than is used"


def test_no_file_imports_in_a_circle() -> None:
    assert list(circles({module: imports(module) for module in modules()})) == []


def test_circles_are_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("cd"), "c": frozenset("a"), "d": frozenset()}
    assert list(circles(graph)) == [["a", "b", "c", "a"], ["b", "c", "a", "b"], ["c", "a", "b", "c"]]


def test_the_model_knows_nothing_of_processes() -> None:
    for module, file in modules().items():
        if module.split(".")[0] == "stdit_model":
            assert "torch.distributed" not in file.read_text(), module


def test_folders_are_small_and_say_what_they_are_for() -> None:
    for name, file in modules().items():
        if file.name == "__init__.py":
            files = [path for path in file.parent.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= MOST_FILES, f"{name} holds {len(files)} files"
            assert len((ast.get_docstring(ast.parse(file.read_text())) or "").split()) >= 3, file


@pytest.mark.parametrize("package", PACKAGES_MAY_IMPORT)
def test_every_package_is_typed_and_documented(package: str) -> None:
    root = PACKAGES / package.replace("_", "-")
    assert (root / "src" / package / "py.typed").exists()
    for name in ("README.md", "CHANGELOG.md"):
        assert len((root / name).read_text().split()) > 3, name
