"""From what a user calls a checkpoint to a pipeline on the best device here."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stdit_model import STDiTPipeline
from stdit_model.sampling.components import load_part
from stdit_model.sampling.folder import HUB_COMPONENTS, T5
from stdit_model.weights.files import read_json
from stdit_model.weights.hub import local_path, split_hub_id
from stdit_train.checkpoint.run_folder import stage_folders
from stdit_train.components.load import eight_bit_config, quiet_libraries
from stdit_train.config.load import ConfigError
from stdit_train.hardware import find_device


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint: a pipeline's folder or Hub id, or bare weights that need a VAE and a text encoder beside them."""

    source: str
    bare: bool

    def weights(self) -> list[Path]:
        """The files that hold the transformer, which tell one checkpoint from another; fetched if need be."""
        place = local_path(self.source, None if self.bare else "transformer")
        if place.is_file():
            return [place]
        inner = place / "transformer"
        return sorted((inner if inner.is_dir() else place).glob("*.safetensors"))


def find_checkpoint(checkpoint: str) -> CheckpointSource:
    """What a checkpoint means: a pipeline folder or that inside a run folder, a file, a Hub id as it is.

    A schedule's folder stands for the last of its stages that has a pipeline.

    Raises:
        ConfigError: a run folder without a finished pipeline, or nothing there.
    """
    path = Path(checkpoint).expanduser()
    stages = stage_folders(path)
    if stages and stages != [path]:  # the last that has come to its pipeline
        path = next((stage for stage in reversed(stages) if (stage / "pipeline").is_dir()), stages[0])
    for folder in (path, path / "pipeline"):
        index = folder / "model_index.json"
        if index.is_file():
            return CheckpointSource(str(folder), bare=read_json(index).get("_class_name") != "STDiTPipeline")
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        raise ConfigError(f"{path} is a run that has saved no pipeline yet: let it finish, or stop it once with Ctrl-C")
    if path.is_file() or (path / "config.json").is_file():
        return CheckpointSource(str(path), bare=True)
    if path.is_dir():
        raise ConfigError(
            f"{path} is neither a pipeline folder (model_index.json), a run folder nor a model's (config.json)"
        )
    hub_id = split_hub_id(checkpoint)
    if checkpoint.startswith((".", "/", "~")) or hub_id is None or Path(path.parts[0]).is_dir():
        raise ConfigError(
            f"no checkpoint at {checkpoint}: give a pipeline folder, a run folder, a released file or a hub id"
        )
    return CheckpointSource(checkpoint, bare=bool(hub_id[1]))


def load_pipeline(
    checkpoint: str | CheckpointSource,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_8bit: bool = False,
    low_memory: bool = False,
) -> STDiTPipeline:
    """Load a pipeline, its progress bar off: in bfloat16 on CUDA, else in float32 on MPS or the CPU.

    Args:
        checkpoint: a pipeline folder, a run folder, a released file or a Hub id; or what `find_checkpoint` found.
        vae, text_encoder: folders or Hub ids that replace the checkpoint's, or complete bare weights.
        text_8bit: the text encoder's weights in 8 bits.
        low_memory: leave the text encoder out, see `attach_text_encoder`, and everything in main memory.

    Raises:
        ConfigError: it can't be found or, offline, not be fetched; 8 bits without bitsandbytes, told first of all.
        WeightsError: a part of it can't.
    """
    if text_8bit:
        _eight_bits()  # else told only when its turn comes, after minutes of loading
    found = checkpoint if isinstance(checkpoint, CheckpointSource) else find_checkpoint(checkpoint)
    device = find_device()
    dtype = _dtype(device)
    quiet_libraries()
    options: dict[str, Any] = {}
    if low_memory or text_8bit:
        encoder = None if low_memory else _load_text_encoder(found, text_encoder, dtype, text_8bit)
        options["text_encoder"] = encoder
        if found.bare:
            options["tokenizer"] = _text_source(found, text_encoder)
        elif text_encoder:
            options["tokenizer"] = load_part("tokenizer", text_encoder)
    if found.bare:
        whole = Path(found.source) if (Path(found.source) / "model_index.json").is_file() else None
        given = {"vae": vae or whole, "text_encoder": text_encoder or whole}
        options = {**{part: source for part, source in given.items() if source is not None}, **options}
        pipeline = STDiTPipeline.from_released(found.source, dtype=dtype, **options)
    else:
        if vae is not None:
            options["vae"] = load_part("vae", vae)
        if text_encoder is not None and "text_encoder" not in options:
            options["text_encoder"] = load_part("text_encoder", text_encoder, dtype=dtype)
            options["tokenizer"] = load_part("tokenizer", text_encoder)
        pipeline = _from_pretrained(found.source, dtype=dtype, **options)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, *([] if low_memory or text_8bit else [pipeline.text_encoder])):
        torch.nn.Module.to(part, dtype)  # what was given, and whatever older diffusers left as it was
    return pipeline if low_memory else pipeline.to(device)


def attach_text_encoder(
    pipeline: STDiTPipeline, checkpoint: CheckpointSource, *, text_encoder: str | None = None, text_8bit: bool = False
) -> None:
    """Put the text encoder, alone, on the device of a pipeline that was loaded with `low_memory`."""
    device = find_device()
    encoder = _load_text_encoder(checkpoint, text_encoder, _dtype(device), text_8bit)
    pipeline.text_encoder = encoder if text_8bit else encoder.to(device)


def free_text_encoder(pipeline: STDiTPipeline) -> None:
    """Drop the text encoder and put the others on the device."""
    pipeline.text_encoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pipeline.to(find_device())


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _text_source(found: CheckpointSource, text_encoder: str | None) -> str:
    """Where text encoder and tokenizer come from."""
    if text_encoder is not None:
        return text_encoder
    index = Path(found.source) / "model_index.json"
    if index.is_file():
        return read_json(index).get(HUB_COMPONENTS, {}).get("text_encoder", found.source)
    return T5 if found.bare else f"{found.source}/text_encoder"


def _load_text_encoder(found: CheckpointSource, text_encoder: str | None, dtype: torch.dtype, text_8bit: bool) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if text_8bit:
        options |= {"quantization_config": _eight_bits(), "device_map": {"": find_device()}}
    return load_part("text_encoder", _text_source(found, text_encoder), **options)


def _eight_bits() -> Any:
    return eight_bit_config("--text-8bit", "--low-memory alone")


def _from_pretrained(source: str, **options: Any) -> STDiTPipeline:
    try:
        return STDiTPipeline.from_pretrained(source, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load {source!r}: {reason}. Download it where there is a network (hf download {source}) "
            "and give its folder with --checkpoint"
        ) from error
