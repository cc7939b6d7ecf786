"""Find the file of a LoRA adapter, and the package that it needs, without torch."""

import importlib.util
from pathlib import Path

from stdit_model.errors import SettingsError, WeightsFileNotFoundError
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.hub import local_path, split_hub_id


def require_peft(option: str) -> None:
    """Check that peft is installed.

    Args:
        option: what needs it, to begin the message with.

    Raises:
        SettingsError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec("peft") is None:
        raise SettingsError(f"{option} needs peft: run `uv sync --extra lora`, or pip install 'stdit-model[lora]'")


def find_lora(source: str | Path) -> Path:
    """Find the file of an adapter.

    Args:
        source: the file, a folder that has `LORA_FILE`, such as a run's, or a Hub id: "owner/name" or
            "owner/name/FILE".

    Raises:
        WeightsFileNotFoundError: there is none.
        WeightsError: it is not available from the Hub.
    """
    path, hub_id = Path(source).expanduser(), split_hub_id(str(source))
    if not path.exists() and hub_id is not None and not hub_id[1].endswith(".safetensors"):
        source = "/".join(filter(None, (*hub_id, LORA_FILE)))
    found = local_path(source)
    file = found / LORA_FILE if found.is_dir() else found
    if not file.is_file():
        raise WeightsFileNotFoundError(f"{source}: no {LORA_FILE} in this folder, so it holds no adapter")
    return file
