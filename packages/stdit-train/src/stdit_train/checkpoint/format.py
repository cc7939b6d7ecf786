"""Training checkpoints: a folder for each, written beside and renamed, so that there is never half of one.

step-000500/tensors/ (torch.distributed.checkpoint)  state.json (everything else, and each file's size and SHA-256)

Loading tensors/ executes what its pickled index says, so a checkpoint is for the run that wrote it. It is loaded only
once state.json names this run and every file is what was written; weights of others enter as safetensors (`--init`).
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from stdit_train.config.load import ConfigError

FORMAT = 1


_TENSORS, _STATE = "tensors", "state.json"


warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a case, not a fault


class CheckpointError(ConfigError):
    """A checkpoint that is torn, or of another run; the message names it and says what is wrong."""


def checkpoint_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by name, oldest first; whether one is whole, `verify` says."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / _STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def named_tensors(model: nn.Module, ema: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """All that a run has learnt so far, as "model.NAME", "ema.NAME" and "optimizer.PARAMETER.KEY"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


def begin_write(
    partial: Path, tensors: Mapping[str, Tensor], *, asynchronous: bool, group: dist.ProcessGroup | None = None
) -> Future[Any] | None:
    """Write tensors into an empty folder `partial`; asynchronously, they are copied first and a future is returned.

    Args:
        partial: the folder.
        tensors: by name; of shards every process writes its own.
        asynchronous: whether to return at once.
        group: of the processes, for messages of their own beside the step's.

    Raises:
        OSError: the disk is full, or what else the system says.
    """
    alone = not dist.is_initialized()
    writer = dcp.FileSystemWriter(partial / _TENSORS, sync_files=True)
    try:
        if asynchronous:
            saving = dcp.async_save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
            return saving if isinstance(saving, Future) else saving.upload_completion
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    except dcp.CheckpointException as error:
        raise root_cause(error) from error
    return None


def finish_write(partial: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Seal a folder whose tensors are written, and move it into place. `state` is plain JSON."""
    files = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted((partial / _TENSORS).iterdir())
    }
    with (partial / _STATE).open("w") as file:
        json.dump({"format": FORMAT, **state, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial / _TENSORS)
    _sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync_folder(final.parent)


def root_cause(error: BaseException) -> Exception | KeyboardInterrupt:
    """What torch.distributed.checkpoint wraps in its own BaseException; Ctrl-C too."""
    causes = [failure[0] for failure in (getattr(error, "failures", None) or {}).values()] or [error]
    cause = next((cause for cause in causes if isinstance(cause, KeyboardInterrupt)), causes[0])
    return cause if isinstance(cause, (Exception, KeyboardInterrupt)) else RuntimeError(str(cause))


def verify(path: Path, run_id: str) -> dict[str, Any]:
    """The state of a checkpoint that is whole and of this run; nothing pickled is read for it.

    Raises:
        CheckpointError: it is not.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        found, files = (state["format"], state["run"]), state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is torn: its {_STATE} can't be read") from error
    if found != (FORMAT, run_id):
        raise CheckpointError(f"checkpoint {path} is of another run ({found[1]}, this is {run_id})")
    for name, known in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != known["bytes"] or _digest(file) != known["sha256"]:
            raise CheckpointError(f"checkpoint {path} is torn: {name} is not what was written")
    return state


def newest_whole(folder: Path, run_id: str, said: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole and of this run; those after it are refused by name and set aside.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; they stay where they are.
    """
    refused: list[tuple[Path, CheckpointError]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path, run_id)
        except CheckpointError as error:
            refused.append((path, error))
            continue
        for bad, why in refused:
            aside = bad.with_name(f"refused-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            said(f"{why}; set aside as {aside.name}, the one before is used")
        return path
    if refused:
        raise CheckpointError(f"{refused[-1][1]}, and there is none before it: start anew in another folder with --out")
    return None


def load_checkpoint(
    path: Path,
    run_id: str,
    model: nn.Module,
    ema: nn.Module,
    optimizers: list[Optimizer],
    decided: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore everything in place; returns the state and the tensors that are none of theirs.

    Args:
        path: of the checkpoint.
        run_id: whose it must be.
        model, ema, optimizers: to be filled, on as many processes as there are now.
        decided: `World.decided`, so that only one process looks whether all is whole.

    Raises:
        CheckpointError: torn, or of another run.
        ConfigError: of another model or optimiser.
    """
    state = decided(lambda: verify(path, run_id))
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if state["optimizers"] != kinds:
        trained = " and ".join(state["optimizers"])
        raise ConfigError(f"{path} was trained with another optimizer ({trained}): resume with the run's own settings")
    stored = _stored_shapes(path)
    targets = named_tensors(model, ema, [])
    _check_fit(path, targets, stored)
    places = _optimizer_places(model, optimizers, stored)
    rest = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in stored.items()
        if not name.startswith(("model.", "ema.", "optimizer."))
    }
    _read(path, targets | {name: tensor for part in places for name, (_, _, tensor) in part.items()} | rest)
    for optimizer, part in zip(optimizers, places, strict=True):
        states: dict[int, dict[str, Tensor]] = {}
        for index, key, tensor in part.values():
            states.setdefault(index, {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return state, rest


def load_weights(path: Path, run_id: str, model: nn.Module, ema: nn.Module) -> None:
    """Restore the weights and their average alone.

    Raises:
        CheckpointError: torn, or of another run.
        ConfigError: of another model.
    """
    verify(path, run_id)
    targets = named_tensors(model, ema, [])
    _check_fit(path, targets, _stored_shapes(path))
    _read(path, targets)


def _stored_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    metadata = dcp.FileSystemReader(path / _TENSORS).read_metadata().state_dict_metadata
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


def _optimizer_places(
    model: nn.Module, optimizers: list[Optimizer], stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> list[dict[str, tuple[int, str, Tensor]]]:
    """For each optimiser, where its stored tensors go: name to (parameter's number, key, empty tensor)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = []
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
        places.append(part)
    return places


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / _TENSORS), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise root_cause(error) from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is, so that a power cut leaves the old checkpoint or the new one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def generators_state() -> dict[str, Tensor]:
    """The state of torch's own generators. No step draws from them, but what a user adds may."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_generators(state: dict[str, Tensor]) -> None:
    """Go on from `generators_state`; of a machine with other devices, what there is."""
    if "rng.cpu" in state:
        torch.set_rng_state(state["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda{i}"], i)
