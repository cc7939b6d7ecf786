"""Checkpoint files opened without reading their tensors.

What a file is shows in its first bytes, not its name: a safetensors file, the index of a sharded one, or a torch
archive. Pickles are read with weights_only=True, and memory-mapped where the archive allows it.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stdit_model.errors import WeightsError, few

# The places a training loop puts a state dict in: Open-Sora v1 (`ema`) and PixArt-alpha (`state_dict`).
ENTRIES = ("ema", "state_dict")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and dtype, and how to read it when it's wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def unsqueeze(self, axis: int) -> "LazyTensor":
        """As Tensor.unsqueeze."""
        shape = (*self.shape[:axis], 1, *self.shape[axis:])
        return LazyTensor(shape, self.dtype, lambda: self.read().unsqueeze(axis))


def packed(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors put together along their first axis (separate q, k and v as one qkv)."""
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(
        (rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.read() for part in parts], dim=0)
    )


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by the names it gives them.

    Attributes:
        path: the file (of a sharded checkpoint, its index).
        tensors: name -> lazy tensor.
        entry: where in a torch archive they were, such as "state_dict"; None at the top level.
        beside: what else the archive's top level holds.
        config: the config.json that diffusers saved with it, if it did.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    entry: str | None = None
    beside: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """Open a file, or the one set of weights that a folder holds.

    Args:
        path: a safetensors file, the index of a sharded one, a torch archive, or a folder (a diffusers model or a
            whole pipeline, whose `transformer` is meant).
        entry: the entry of a torch archive to read ("state_dict_ema"); found among `ENTRIES` unless given.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it is no checkpoint, holds no tensors, or more than tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    file = _weights_in(path) if path.is_dir() else path
    with file.open("rb") as stream:
        head = stream.read(16)
    config_file = file.parent / "config.json"
    paired = file.name.startswith("diffusion_pytorch_model") and config_file.is_file()  # as diffusers saves them
    config = read_json(config_file) if paired else {}
    if head.startswith(b"version https:"):
        raise WeightsError(f"{file}: a git-lfs pointer, not the weights: fetch the file itself with `git lfs pull`")
    if head[:1] == b"{":
        checkpoint = Checkpoint(file, _sharded(file), config=config)
    elif head[8:9] == b"{":
        checkpoint = Checkpoint(file, _safetensors(file), config=config)
    elif zipfile.is_zipfile(file) or head[:1] == b"\x80":
        tensors, found, beside = _archive(file, entry)
        checkpoint = Checkpoint(file, tensors, found, beside, config)
    else:
        raise WeightsError(f"{file}: neither a safetensors file nor a torch archive")
    if entry is not None and checkpoint.entry != entry:
        raise WeightsError(f"{file}: has no entry {entry!r}, its tensors are at the top level")
    if not checkpoint.tensors:
        raise WeightsError(f"{file}: holds no tensors")
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: a JSON object expected, not {type(value).__name__}")
    return value


def _weights_in(folder: Path) -> Path:
    """The weights of a folder."""
    for name in ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    if (folder / "transformer").is_dir():
        return _weights_in(folder / "transformer")
    for pattern in ("*.index.json", "*.safetensors", "*.pth"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise WeightsError(f"{folder}: several checkpoints ({few([f.name for f in files])}): name one of them")
    there = sorted(f.name for f in folder.iterdir())
    raise WeightsError(f"{folder}: no weights in this folder, which holds {few(there) or 'nothing'}")


def _safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(file, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({error})") from error

    def lazy(name: str) -> LazyTensor:
        dtype = slices[name].get_dtype()
        if dtype not in _DTYPES:
            raise WeightsError(f"{file}: {name} is of type {dtype}, which no weight here can be")
        return LazyTensor(tuple(slices[name].get_shape()), _DTYPES[dtype], lambda: handle.get_tensor(name))

    return {name: lazy(name) for name in slices}


def _sharded(index: Path) -> dict[str, LazyTensor]:
    """The shards' own tensors, each where the index says it is."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no index of a sharded checkpoint (it has no weight_map)")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{index}: names the shard {shard!r}; a plain file name beside it expected")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such file, though {index.name} names it as a shard")
        tensors |= _safetensors(index.parent / shard)
    astray = sorted(weight_map.keys() ^ tensors.keys())
    if astray:
        raise WeightsError(f"{index}: the index and its shards differ by {few(astray)}; write or fetch them again")
    return tensors


def _archive(file: Path, entry: str | None) -> tuple[dict[str, LazyTensor], str | None, tuple[str, ...]]:
    """Tensors of a torch archive, the entry they were in, and the names of the other entries."""
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
        raise WeightsError(f"{file}: a state dict expected, not {type(content).__name__}")
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
        raise WeightsError(f"{file}: not all of its state dict are tensors: {few(others)}")
    return {name: LazyTensor.of(tensor) for name, tensor in state.items()}, found, beside
