"""Versions of Python, of our packages and of those that decide on a run's numbers."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "stdit-cli",
    "stdit-train",
    "stdit-model",
    "stdit-data",
    "diffusers",
    "transformers",
    "torchdata",
    "av",
    "safetensors",
    "huggingface-hub",
)


def package_versions() -> dict[str, str]:
    """Return versions by name, Python's first."""
    import torch  # not at the top: a command that is refused has no need of it

    found = {"python": platform.python_version(), "torch": torch.__version__}  # with its build, e.g. 2.11.0+cpu
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
