"""Open checkpoint files without reading their tensors into memory.

The format is recognised by a file's first bytes, not its name: a safetensors file, the index of a sharded one, or a
torch archive. Tensors are memory-mapped, except those of torch archives in the legacy (non-zip) format. Archives are
unpickled with weights_only=True.
"""

import json
import pickle
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stdit_model.errors import WeightsError, WeightsFileNotFoundError, few, reason
from stdit_model.weights.folders import SAVED_NAMES, find_weights, read_json

# Under which state dicts are saved: by Open-Sora v1, PixArt-alpha and Lightning, other trainers, and DeepSpeed.
ENTRIES = ("ema", "state_dict", "model", "model_state_dict", "module")
WRAPPERS = re.compile(
    r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\."
)  # of torch, anywhere in a name
SETTINGS = "stdit_model"  # of the metadata of a file, for settings that Open-Sora's layout has no place for


@dataclass(frozen=True)
class PackedTensor:
    """Tensors to be concatenated along their first axis when they are read: separate q, k and v as one qkv."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated tensor."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first part."""
        return self.parts[0].dtype

    def read(self) -> Tensor:
        """Concatenate the parts."""
        return torch.cat(self.parts)


StoredTensor: TypeAlias = Tensor | PackedTensor


def read_tensor(tensor: StoredTensor) -> Tensor:
    """Return a tensor of a checkpoint as one tensor, concatenated if it is packed."""
    return tensor.read() if isinstance(tensor, PackedTensor) else tensor


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint under the names that its file gives them.

    Attributes:
        path: the file, or the index of a sharded checkpoint.
        tensors: memory-mapped tensors by name.
        entry: the torch archive's entry that holds them, such as "state_dict"; None at the top level.
        beside: the other entries of the archive.
        config: the config.json that diffusers saved beside the file, or the settings that `write_open_sora` put into
            its metadata; empty if there is neither.
    """

    path: Path
    tensors: dict[str, Tensor]
    entry: str | None = None
    beside: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """Open a checkpoint file, or the only checkpoint in a folder.

    Args:
        path: a safetensors file, the index of a sharded one, a torch archive, or a folder: a diffusers model, or a
            pipeline, whose `transformer` is opened.
        entry: the entry of a torch archive to read, such as "state_dict_ema"; by default the first of `ENTRIES`.

    Raises:
        WeightsFileNotFoundError: the path does not exist, or the folder lacks a file that it should have.
        WeightsError: the file is not a checkpoint, holds no tensors, or holds anything but tensors.
    """
    if not path.exists():
        raise WeightsFileNotFoundError(f"{path}: no such file or folder")
    file = find_weights(path) if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise WeightsError(f"{file}: not readable ({reason(error)})") from error
    config_file = file.parent / "config.json"
    paired = file.name.startswith(SAVED_NAMES) and config_file.is_file()
    config = read_json(config_file) if paired else {}
    paired = "_class_name" in config  # of a diffusers model
    config = config if paired else {}
    if head.startswith(b"version https:"):
        raise WeightsError(f"{file}: a git-lfs pointer, not the weights: fetch the file itself with `git lfs pull`")
    if head[:1] == b"{":
        checkpoint = Checkpoint(file, _sharded(file), config=config)
    elif head[8:9] == b"{":
        checkpoint = Checkpoint(file, _safetensors(file), config=config or _safetensors_settings(file))
    elif zipfile.is_zipfile(file) or head[:1] == b"\x80":
        tensors, found, beside, settings = _archive(file, entry)
        checkpoint = Checkpoint(file, tensors, found, beside, config or settings)
    else:
        raise WeightsError(f"{file}: neither a safetensors file nor a torch archive")
    if entry is not None and checkpoint.entry != entry:
        raise WeightsError(f"{file}: has no entry {entry!r}, its tensors are at the top level")
    if not checkpoint.tensors:
        raise WeightsError(f"{file}: holds no tensors")
    return checkpoint if paired else replace(checkpoint, tensors=_unwrapped(checkpoint.tensors))


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the names of DistributedDataParallel, torch.compile and other wrappers around a module from its names."""
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({reason(error)})") from error


def _safetensors_settings(file: Path) -> dict[str, Any]:
    """Return the model's settings in a file's metadata, {} if there are none."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(SETTINGS, "{}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{file}: its metadata {SETTINGS!r} is not valid JSON ({error})") from error
    return settings if isinstance(settings, dict) else {}


def _sharded(index: Path) -> dict[str, Tensor]:
    """Open the shards of an index, which must hold exactly the tensors that the index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no index of a sharded checkpoint (it has no weight_map)")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{index}: names the shard {shard!r}; expected the name of a file beside it")
        if not (index.parent / shard).is_file():
            raise WeightsFileNotFoundError(
                f"{index.parent / shard}: no such file, though {index.name} lists it as a shard"
            )
        file = index.parent / shard
        tensors |= _archive(file, None)[0] if file.suffix == ".bin" else _safetensors(file)
    astray = sorted(weight_map.keys() ^ tensors.keys())
    if astray:
        raise WeightsError(f"{index}: the index and its shards differ by {few(astray)}; write or fetch them again")
    return tensors


def _archive(file: Path, entry: str | None) -> tuple[dict[str, Tensor], str | None, tuple[str, ...], dict[str, Any]]:
    """Open a torch archive: its tensors, the entry that holds them, the names of the other entries, and settings."""
    try:
        if zipfile.is_zipfile(file) and file.suffix != ".safetensors":  # by which torch.load would go
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            with file.open("rb") as stream:
                content = torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        foreign = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        reason = f"asks for {foreign[1]}" if foreign else "is damaged, or of another kind"
        raise WeightsError(
            f"{file}: not a torch archive of tensors alone, it {reason}; nothing else is loaded, since unpickling runs "
            "code: save its state dict by itself"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: expected a state dict, not {type(content).__name__}")
    found = None
    entries = [name for name, value in content.items() if isinstance(value, dict)]
    if entries or entry is not None:
        found = entry if entry is not None else next((name for name in ENTRIES if name in entries), None)
        if found not in entries:
            asked = f"no entry {found!r}" if found else f"none of the entries {', '.join(ENTRIES)}"
            raise WeightsError(f"{file}: {asked}; it holds {few([str(name) for name in content])}")
    beside = tuple(str(name) for name in content if name != found) if found is not None else ()
    stray = [name for name in beside if isinstance(content[name], Tensor)]
    if stray:
        raise WeightsError(f"{file}: tensors beside the entry {found!r}: {few(stray)}; only a state dict is expected")
    state = content if found is None else content[found]
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(f"{file}: entries of its state dict are not tensors: {few(others)}")
    settings = getattr(state, "_metadata", {}).get(SETTINGS, {})  # torch has a dict of metadata on every state dict
    return dict(state), found, beside, settings
