"""Write and read the sidecar: a JSON file beside each video with all that `--from` needs to reproduce it."""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.request import Job, Settings
from stdit_data.storage.atomic import replace_text
from stdit_data.storage.files import wrap_errors
from stdit_train.errors import ConfigError
from stdit_train.versions import package_versions

VIDEO: dict[str, Any] = {"prompt": str, "negative": str | None, "seed": int}
# Keys of a sidecar that are read back, with their types.
SHAPE: dict[str, Any] = {
    **VIDEO,
    "settings": dict,
    "batch": {"index": int, "videos": [VIDEO]},
    "checkpoint": {"sha256": str},
    "used": dict,
    "made_on": {"device": str, "threads": int},
    "versions": dict,
}
RENAMED = {"settling": "resampling_steps"}  # settings of older versions


def build(
    settings: Settings, batch: list[Job], index: int, weights: dict[str, Any], used: dict[str, Any], device: str
) -> dict[str, Any]:
    """Build the content of a sidecar.

    Args:
        settings: with every number that the checkpoint supplied.
        batch: the videos that were made together, since batching shows in the last bits.
        index: of this video in the batch.
        weights: source and sha256 of the checkpoint.
        used: what follows from the settings: sampler, sizes.
        device: that it was computed on.
    """
    import torch

    job = batch[index]
    return {
        "prompt": job.prompt,
        "negative": job.negative,
        "seed": job.seed,
        "settings": asdict(settings),
        "batch": {
            "index": index,
            "videos": [{"prompt": j.prompt, "negative": j.negative, "seed": j.seed} for j in batch],
        },
        "checkpoint": weights,
        "used": used,
        "made_on": {"device": device, "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": package_versions(),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a sidecar, whole or not at all."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a sidecar, with settings of older versions under their new names.

    Args:
        path: of the sidecar, or of its video.

    Raises:
        ConfigError: no such file, not a sidecar, or one with settings that this version does not know.
    """
    from stdit_cli.commands.sample.outputs import old_sidecar_path, sidecar_path

    file = path if path.suffix == ".json" or not path.name else sidecar_path(path)
    if not file.is_file() and file != path and old_sidecar_path(path).is_file():
        file = old_sidecar_path(path)
    if not file.is_file():
        raise ConfigError(f"--from {file}: no such file; `stdit sample` writes one beside each video")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--from {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--from {file}: not JSON ({error})") from error
    if not _fits(content, SHAPE) or not 0 <= content["batch"]["index"] < len(content["batch"]["videos"]):
        raise ConfigError(f"--from {file}: not the sidecar of a video of `stdit sample`")
    settings = {RENAMED.get(name, name): value for name, value in content["settings"].items()}
    unknown = sorted(settings.keys() - {field.name for field in fields(Settings)})
    if unknown:
        raise ConfigError(f"--from {file}: unknown settings: {', '.join(unknown)}")
    for field in fields(Settings):
        if not _fits(value := settings.get(field.name, field.default), field.type):
            raise ConfigError(f"--from {file}: {field.name} {value!r}: expected {_type_name(field.type)}")
    return {**content, "settings": settings}


def _fits(value: Any, shape: Any) -> bool:
    """Return whether a JSON value has the keys and types of a shape: a type, a list of one shape, or shapes by key."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(0.0, shape):
        return True  # JSON writers may drop a zero fraction
    return isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)


def _type_name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).replace("None", "null")


def sha256(files: Iterable[Path]) -> str:
    """Return the SHA-256 of a file; of several files, that of their names and hashes in the order of names.

    Raises:
        FileError: a file cannot be read.
    """
    hashes = {}
    for file in sorted(files):
        with wrap_errors(str(file)), file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in hashes.items()).encode()).hexdigest()
