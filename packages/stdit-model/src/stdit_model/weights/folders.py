"""What a folder of weights holds, without torch: its checkpoint, and its JSON files."""

import json
from pathlib import Path
from typing import Any

from stdit_model.errors import WeightsError, WeightsFileNotFoundError, few, reason

SAVED_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # that models are saved under, beside a config.json
LORA_FILE = "pytorch_lora_weights.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        WeightsError: the file is not valid JSON, or holds another type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: not readable ({reason(error)})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def find_weights(folder: Path) -> Path:
    """Find the only checkpoint in a folder of a model or pipeline: a file, or the index of a sharded one.

    Complete safetensors come before variants such as fp16, and those before torch archives.

    Raises:
        WeightsFileNotFoundError: there is none.
        WeightsError: there are several.
    """
    if (folder / "transformer").is_dir() and not any(folder.glob("diffusion_pytorch_model*")):
        return find_weights(folder / "transformer")
    for stem in SAVED_NAMES:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    for pattern in ("*.safetensors.index*.json", "*.safetensors", "*.index*.json", "*.bin", "*.pth"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise WeightsError(f"{folder}: several checkpoints ({few([f.name for f in files])}): name one of them")
    there = sorted(f.name for f in folder.iterdir())
    raise WeightsFileNotFoundError(
        f"{folder}: no weights in this folder, which holds {few(there)}" if there else f"{folder}: is an empty folder"
    )


def has_weights(folder: Path) -> bool:
    """Whether there is a checkpoint in a folder, or several."""
    try:
        find_weights(folder)
    except WeightsFileNotFoundError:
        return False
    except WeightsError:
        return True
    return True
