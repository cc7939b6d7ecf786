"""Find a checkpoint by any name a user may give it, and what it was trained for, before anything is loaded.

Nothing here imports torch, except for weights without a pipeline, so that a wrong name is told at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit_model.sampling.bundled import bundled_names, bundled_pipeline
from stdit_model.sampling.components import INDEX, hub_index, own_parts
from stdit_model.sampling.schedulers import recorded_objective
from stdit_model.weights.folders import LORA_FILE, find_weights, has_weights, read_json
from stdit_model.weights.hub import local_path, split_hub_id
from stdit_train.checkpoint.run_folder import stage_folders
from stdit_train.components.find_vae import find_vae
from stdit_train.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """What a checkpoint was trained for."""

    frames: int
    flow: bool | None  # rectified flow, else iDDPM; None if only loading its scheduler would tell


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint is."""

    source: str  # folder, file or Hub id
    bare: bool  # the transformer's weights alone, without VAE and text encoder

    def weights(self) -> list[Path]:
        """Return the files with the transformer's weights, downloaded if need be; they identify the checkpoint."""
        place = local_path(self.source, None if self.bare else "transformer")
        if place.is_file():
            return [place]
        inner = place / "transformer" if (place / "transformer").is_dir() else place
        return sorted(inner.glob("*.safetensors")) or sorted(inner.glob("*.bin")) or [find_weights(inner)]

    def trained(self) -> Trained:
        """Return what the checkpoint was trained for, without reading its weights.

        Of bare weights the names and shapes are checked, as `stdit weights inspect` does; on the Hub, they are
        downloaded for it.

        Raises:
            WeightsError: a file or folder of another kind, or not available from the Hub.
        """
        if self.bare:
            from stdit_model import convert
            from stdit_model.sampling.released import trained_frames

            found = convert.find(self.source)
            return Trained(trained_frames(found), flow=not found.config["learn_sigma"])
        folder = Path(self.source)
        index = read_json(folder / INDEX if folder.is_dir() else hub_index(self.source))
        scheduler = index.get("scheduler")
        name = scheduler[1] if isinstance(scheduler, list) and len(scheduler) == 2 else None
        file = folder / "scheduler" / "scheduler_config.json"
        flow = None if name is None else recorded_objective(name, read_json(file) if file.is_file() else None)
        frames: Any = index.get("num_frames")
        return Trained(frames if isinstance(frames, int) else 16, flow)


def find_checkpoint(checkpoint: str) -> CheckpointSource:
    """Find what a checkpoint's name stands for.

    Args:
        checkpoint: a pipeline folder, a run folder (its pipeline), a schedule's folder (the last stage that has a
            pipeline), a file or folder of weights, the name of a bundled pipeline ("demo"), or a Hub id. A local
            folder or file takes precedence.

    Raises:
        ConfigError: the run has no pipeline yet, or there is no such checkpoint.
        WeightsError: a pipeline around a model of another kind, or one that is not available from the Hub.
    """
    path = Path(checkpoint).expanduser()
    stages = stage_folders(path)
    if stages and stages != [path]:
        path = next((stage for stage in reversed(stages) if (stage / "pipeline").is_dir()), stages[0])
    for folder in (path, path / "pipeline"):
        index = folder / INDEX
        if index.is_file():
            return _whole_or_bare(str(folder), index)
    if path.exists() and find_vae(str(path)) is not None:
        raise ConfigError(
            f"{path} is a VAE, not a pipeline: train on it with --vae {path}, or measure it with stdit eval"
        )
    if (path / LORA_FILE).is_file():
        raise ConfigError(f"{path} holds a LoRA adapter: give it with --lora, and its model with --checkpoint")
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{path} is a run that has saved no pipeline yet: let it finish, or make one from its newest checkpoint "
            f"with `stdit export {path} OUT`"
        )
    if path.is_file() or (path.is_dir() and has_weights(path)):
        return CheckpointSource(str(path), bare=True)
    bundled = bundled_pipeline(checkpoint)
    if path.is_dir():
        hint = "; it takes precedence over the bundled pipeline of that name" if bundled is not None else ""
        raise ConfigError(
            f"{path} is neither a pipeline folder ({INDEX}), a run folder nor a folder with weights{hint}"
        )
    if bundled is not None:
        return CheckpointSource(str(bundled), bare=False)
    hub_id = split_hub_id(checkpoint)
    if checkpoint.startswith((".", "/", "~")) or hub_id is None or Path(path.parts[0]).is_dir():
        raise ConfigError(
            f"no checkpoint at {checkpoint}: give a pipeline folder, a run folder, a released file, a Hub id or a "
            f"bundled pipeline ({', '.join(bundled_names())})"
        )
    return CheckpointSource(checkpoint, bare=True) if hub_id[1] else _whole_or_bare(checkpoint, hub_index(checkpoint))


def _whole_or_bare(source: str, index: Path) -> CheckpointSource:
    """Tell an STDiTPipeline from one whose transformer can be read; others are refused before they are downloaded."""
    bare = read_json(index).get("_class_name") != "STDiTPipeline"
    if bare:
        own_parts(source)
    return CheckpointSource(source, bare)
