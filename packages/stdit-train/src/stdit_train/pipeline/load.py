"""Load a checkpoint, by any name a user may give it, as a pipeline on the best device of this machine."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stdit_model import STDiTPipeline
from stdit_model.sampling.components import load_part
from stdit_model.sampling.folder import HUB_COMPONENTS, T5_ID
from stdit_model.weights.files import read_json
from stdit_model.weights.hub import local_path, split_hub_id
from stdit_train.checkpoint.run_folder import stage_folders
from stdit_train.components.load import eight_bit_config, quiet_libraries
from stdit_train.errors import ConfigError
from stdit_train.hardware import find_device


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
        inner = place / "transformer"
        return sorted((inner if inner.is_dir() else place).glob("*.safetensors"))


def find_checkpoint(checkpoint: str) -> CheckpointSource:
    """Find what a checkpoint's name stands for.

    Args:
        checkpoint: a pipeline folder, a run folder (its pipeline), a schedule's folder (the last stage that has a
            pipeline), a file or folder of weights, or a Hub id.

    Raises:
        ConfigError: the run has no pipeline yet, or there is no such checkpoint.
    """
    path = Path(checkpoint).expanduser()
    stages = stage_folders(path)
    if stages and stages != [path]:
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
            f"{path} is neither a pipeline folder (model_index.json), a run folder nor a model folder (config.json)"
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
    """Load a pipeline: in bfloat16 on CUDA, in float32 on MPS or the CPU; without a progress bar.

    Args:
        checkpoint: as for `find_checkpoint`, or its result.
        vae: folder or Hub id of another VAE than the checkpoint's, or of the VAE for bare weights.
        text_encoder: likewise for text encoder and tokenizer.
        text_8bit: load the text encoder's weights in 8 bits.
        low_memory: leave out the text encoder (`attach_text_encoder` adds it) and keep the rest in main memory.

    Raises:
        ConfigError: the checkpoint cannot be found, read or fetched, or bitsandbytes is missing for 8 bits.
        WeightsError: one of its parts cannot be.
    """
    if text_8bit:
        _eight_bits()  # fails before minutes of loading
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
        sources = {"vae": vae or whole, "text_encoder": text_encoder or whole}
        options = {**{part: source for part, source in sources.items() if source is not None}, **options}
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
        torch.nn.Module.to(part, dtype)  # parts loaded above, and those whose type older diffusers ignore
    return pipeline if low_memory else pipeline.to(device)


def attach_text_encoder(
    pipeline: STDiTPipeline, checkpoint: CheckpointSource, *, text_encoder: str | None = None, text_8bit: bool = False
) -> None:
    """Load the text encoder of a pipeline that was loaded with `low_memory`, and put it alone on the device.

    Arguments and errors are those of `load_pipeline`.
    """
    device = find_device()
    encoder = _load_text_encoder(checkpoint, text_encoder, _dtype(device), text_8bit)
    pipeline.text_encoder = encoder if text_8bit else encoder.to(device)


def free_text_encoder(pipeline: STDiTPipeline) -> None:
    """Remove the text encoder of a pipeline and put the rest on the device."""
    pipeline.text_encoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pipeline.to(find_device())


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _text_source(found: CheckpointSource, text_encoder: str | None) -> str:
    """Return the source of the text encoder and tokenizer."""
    if text_encoder is not None:
        return text_encoder
    index = Path(found.source) / "model_index.json"
    if index.is_file():
        return read_json(index).get(HUB_COMPONENTS, {}).get("text_encoder", found.source)
    return T5_ID if found.bare else f"{found.source}/text_encoder"


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
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(source).is_dir():
            raise ConfigError(f"cannot load the pipeline in {source}: {reason}; copy or export it again") from error
        raise ConfigError(
            f"cannot load {source!r}: {reason}. Download it where there is a network (hf download {source}) "
            "and give its folder with --checkpoint"
        ) from error
