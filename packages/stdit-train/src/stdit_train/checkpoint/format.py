"""Write and load training checkpoints: one folder each, written under another name and renamed when complete.

    step-000500/tensors/    weights, EMA, optimizer states and random generators, by torch.distributed.checkpoint
    step-000500/state.json  step, elapsed seconds, skipped steps, loss bins, loss scale, position in the data; also the
                            run's id, and the size and SHA-256 of each file

A resume (`Trainer.resume`) reads both, after config.json and run.json of the run's folder (`run_folder.py`).

Loading tensors/ unpickles its index, which can run code, so a run loads only its own checkpoints, and only after
`stdit_train.checkpoint.verify` has compared every file with state.json. Weights of others enter as safetensors
(`--init`).
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from stdit_train.checkpoint.verify import FORMAT, STATE, TENSORS, Checkpoint, sha256, tensor_files
from stdit_train.errors import ConfigError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected with one process


def named_tensors(model: nn.Module, ema: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Return weights, average and optimizer state as "model.NAME", "ema.NAME" and "optimizer.PARAMETER.KEY".

    Frozen weights, which the average shares with the model, are left out.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    frozen = {parameter for parameter in names if not parameter.requires_grad}
    tensors: dict[str, Tensor] = {}
    for prefix, part in (("model", model), ("ema", ema)):
        left_out = {name for name, parameter in part.named_parameters() if parameter in frozen}
        tensors |= {f"{prefix}.{name}": value for name, value in part.state_dict().items() if name not in left_out}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


def write_tensors(partial: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors into a folder; every process must call this and writes its own shards.

    Args:
        partial: empty folder.
        tensors: tensors by name.
        group: process group for the messages of the writer. [default: the main one]

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_writer(partial), process_group=group, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise root_cause(error) from error


def begin_write(partial: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> Future[Any]:
    """Copy tensors and write the copy in the background, as `write_tensors` does; the future has its error."""
    alone = not dist.is_initialized()
    saving = dcp.async_save(dict(tensors), storage_writer=_writer(partial), process_group=group, no_dist=alone)
    return saving if isinstance(saving, Future) else saving.upload_completion


def _writer(partial: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(partial / TENSORS, sync_files=True)


def finish_write(partial: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Write state.json, with a hash of each file, beside tensors that are written, and move the folder into place.

    Args:
        partial: folder with the tensors.
        final: where to move it; an older checkpoint there is replaced.
        state: values for state.json.

    Raises:
        FileNotFoundError: a file that some process has written is not in the folder.
        OSError: the disk fails.
    """
    files = {}
    for name in sorted(tensor_files(partial)):
        file = partial / name
        if not file.is_file():
            raise FileNotFoundError(errno.ENOENT, f"{name}, which another process wrote, is not there")
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    with (partial / STATE).open("w") as stream:
        json.dump({"format": FORMAT, **state, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(partial / TENSORS)
    _sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync_folder(final.parent)


def root_cause(error: BaseException) -> Exception | KeyboardInterrupt:
    """Return the error that torch.distributed.checkpoint wrapped in its own BaseException, a KeyboardInterrupt too."""
    causes = [failure[0] for failure in (getattr(error, "failures", None) or {}).values()] or [error]
    cause = next((cause for cause in causes if isinstance(cause, KeyboardInterrupt)), causes[0])
    return cause if isinstance(cause, (Exception, KeyboardInterrupt)) else RuntimeError(str(cause))


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, ema: nn.Module, optimizers: list[Optimizer]
) -> dict[str, Tensor]:
    """Load a checkpoint into a model, its average and its optimizers, on any number of processes.

    Args:
        checkpoint: of the run.
        model, ema, optimizers: filled in place.

    Returns:
        The other tensors of the checkpoint, by name.

    Raises:
        ConfigError: it is of another model or optimizer.
    """
    path, kinds = checkpoint.path, [type(optimizer).__name__ for optimizer in optimizers]
    if checkpoint.state["optimizers"] != kinds:
        trained = " and ".join(checkpoint.state["optimizers"])
        raise ConfigError(f"{path} was trained with another optimizer ({trained}): resume with the run's own settings")
    stored = _stored_shapes(path)
    targets = named_tensors(model, ema, [])
    _check_fit(path, targets, stored)
    slots = _optimizer_slots(model, optimizers, stored)
    rest = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in stored.items()
        if not name.startswith(("model.", "ema.", "optimizer."))
    }
    _read(path, targets | {name: tensor for part in slots for name, (_, _, tensor) in part.items()} | rest)
    for optimizer, part in zip(optimizers, slots, strict=True):
        states: dict[int, dict[str, Tensor]] = {}
        for index, key, tensor in part.values():
            states.setdefault(index, {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return rest


def load_weights(checkpoint: Checkpoint, model: nn.Module, ema: nn.Module) -> None:
    """Load only the weights of a checkpoint and their average.

    Raises:
        ConfigError: it is of another model.
    """
    targets = named_tensors(model, ema, [])
    _check_fit(checkpoint.path, targets, _stored_shapes(checkpoint.path))
    _read(checkpoint.path, targets)


def _stored_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    metadata = dcp.FileSystemReader(path / TENSORS).read_metadata().state_dict_metadata
    return {
        name: (tuple(tensor.size), tensor.properties.dtype)
        for name, tensor in metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def _check_fit(path: Path, targets: dict[str, Tensor], stored: Mapping[str, Any]) -> None:
    theirs = {name: value[0] for name, value in stored.items() if name.startswith(("model.", "ema."))}
    ours = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            there, here = (sizes.get(name, "missing") for sizes in (theirs, ours))
            raise ConfigError(f"{path} does not fit this model: {name} is {there} there and {here} here")


def _optimizer_slots(
    model: nn.Module, optimizers: list[Optimizer], stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> list[dict[str, tuple[int, str, Tensor]]]:
    """Return, for each optimizer, {name on disk: (index of the parameter, key of its state, tensor to read into)}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots = []
    for optimizer in optimizers:
        part: dict[str, tuple[int, str, Tensor]] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            prefix = f"optimizer.{names[parameter]}."
            for name in stored:
                key = name.removeprefix(prefix)
                if name.startswith(prefix) and "." not in key:
                    shape, dtype = stored[name]
                    like = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                    empty = like if shape == tuple(parameter.shape) else torch.empty(shape, dtype=dtype)
                    part[name] = (index, key, empty)
        slots.append(part)
    return slots


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / TENSORS), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise root_cause(error) from error


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a power cut leaves the old checkpoint or the new one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def generators_state() -> dict[str, Tensor]:
    """Return the state of torch's global generators; no step uses them, but a user's code may."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_generators(state: dict[str, Tensor]) -> None:
    """Restore `generators_state`, for the devices that this machine has."""
    if "rng.cpu" in state:
        torch.set_rng_state(state["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda{i}"], i)
