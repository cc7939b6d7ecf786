"""Pipelines that come with installed packages, such as "demo" with stdit-train, found by entry points.

A package brings one by naming, in its pyproject.toml, a function without arguments that returns the pipeline's folder:

    [project.entry-points."stdit_model.pipelines"]
    demo = "stdit_train.assets:demo_folder"
"""

from importlib.metadata import entry_points
from pathlib import Path

GROUP = "stdit_model.pipelines"


def bundled_pipeline(name: str) -> Path | None:
    """Return the folder of a bundled pipeline; None if no installed package has one of this name."""
    found = entry_points(group=GROUP, name=name)
    return Path(next(iter(found)).load()()) if found else None


def bundled_names() -> list[str]:
    """Return the names of all bundled pipelines."""
    return sorted(entry_points(group=GROUP).names)
