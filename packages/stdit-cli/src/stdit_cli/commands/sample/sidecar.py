"""The JSON file beside a video: every setting that made it, with what and from which weights; and back again."""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.request import Job, Settings
from stdit_data.files import replace_text

VIDEO: dict[str, Any] = {"prompt": str, "negative": str | None, "seed": int}
# What is read back of a sidecar.
SHAPE: dict[str, Any] = {
    **VIDEO,
    "settings": dict,
    "batch": {"index": int, "videos": [VIDEO]},
    "checkpoint": {"sha256": str},
    "used": dict,
    "made_on": {"device": str, "threads": int},
    "versions": dict,
}
PACKAGES = ("stdit-cli", "stdit-model", "stdit-data", "diffusers", "transformers", "av")


def build(
    settings: Settings, batch: list[Job], index: int, weights: dict[str, Any], used: dict[str, Any], device: str
) -> dict[str, Any]:
    """What is written beside a video.

    Args:
        settings: with every number that the checkpoint supplied filled in.
        batch: the videos that were made together with it, since that shows in the last bits.
        index: which of them this is.
        weights: of the checkpoint: where from, sha256.
        used: what follows from the settings: scheduler, windows.
        device: what it was computed on.
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
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in PACKAGES},
        },
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a sidecar, whole or not at all."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A sidecar; a video's path means the file beside it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a sidecar, or one with settings that this version does not know.
    """
    from stdit_cli.commands.sample.outputs import sidecar_path

    file = path if path.suffix == ".json" or not path.name else sidecar_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--from {file}: no such file; `stdit sample` writes one beside each video")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--from {file}: not JSON ({error})") from error
    if not _fits(content, SHAPE) or not 0 <= content["batch"]["index"] < len(content["batch"]["videos"]):
        raise ValueError(f"--from {file}: not the sidecar of a video of `stdit sample`")
    known = {field.name for field in fields(Settings)}
    unknown = sorted(content["settings"].keys() - known)
    if unknown:
        raise ValueError(f"--from {file}: a setting that this version does not know: {', '.join(unknown)}")
    for field in fields(Settings):
        if not _fits(value := content["settings"].get(field.name, field.default), field.type):
            raise ValueError(f"--from {file}: {field.name} {value!r} is no setting: expected {_said(field.type)}")
    return content


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value of JSON has the keys and types of a shape: a type, a list of one shape, or shapes by key."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(0.0, shape):
        return True  # JSON writers may drop a zero fraction
    return isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)


def _said(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).replace("None", "null")


def sha256(files: Iterable[Path]) -> str:
    """Of one file its own; of several that of their names and hashes, in order of names."""
    hashes = {}
    for file in sorted(files):
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in hashes.items()).encode()).hexdigest()
