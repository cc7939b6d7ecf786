"""Locate the bundled demo model, and resolve the word "demo" as the source of a component."""

from importlib import resources
from pathlib import Path

DEMO = "demo"


def demo_folder() -> Path:
    """Return the pipeline folder of the demo model inside the installed package."""
    return Path(str(resources.files("stdit_train").joinpath("assets", "demo")))


def resolve_source(source: str) -> str:
    """Return a path or Hub id as it is, and for "demo" the bundled pipeline folder."""
    return str(demo_folder()) if source == DEMO else source


def named_source(source: str) -> str:
    """Return a source as a user names it: a local folder called "demo" takes precedence over the bundled pipeline."""
    return str(Path(source).resolve()) if source == DEMO and Path(source).is_dir() else source


def is_demo_folder(source: str) -> bool:
    """Tell whether a path is the bundled demo model of this or another installation.

    Runs that were started before 0.2.0 have the absolute path in their settings.
    """
    return Path(source).parts[-3:] in (("stdit_train", "assets", "demo"), ("stdit_cli", "assets", "demo"))
