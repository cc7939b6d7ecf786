"""Where the bundled demo model lies, and what "demo" stands for on the command line."""

from importlib import resources
from pathlib import Path


def demo_folder() -> Path:
    """The pipeline folder of the demo model inside the installed package."""
    return Path(str(resources.files("stdit_train").joinpath("assets", "demo")))


def resolve(source: str) -> str:
    """A path or hub id as given; "demo" becomes the bundled pipeline folder."""
    return str(demo_folder()) if source == "demo" else source
