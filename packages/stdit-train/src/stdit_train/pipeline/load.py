"""Load a checkpoint, by any name a user may give it, as a pipeline on the best device of this machine."""

import gc
from collections.abc import Sequence
from typing import Any

import torch

from stdit_model import STDiTPipeline
from stdit_model.sampling.components import load_part, own_parts, require
from stdit_model.sampling.folder import T5_ID
from stdit_model.weights.adapters import load_adapters
from stdit_train.components.load import eight_bit_config, quiet_libraries
from stdit_train.errors import ConfigError
from stdit_train.hardware import find_device, keep_freed_memory
from stdit_train.pipeline.find import CheckpointSource, find_checkpoint


def load_pipeline(
    checkpoint: str | CheckpointSource,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_8bit: bool = False,
    low_memory: bool = False,
    loras: Sequence[tuple[str, float]] = (),
    offload: str | None = None,
) -> STDiTPipeline:
    """Load a pipeline: in bfloat16 on CUDA, in float32 on MPS or the CPU; without a progress bar.

    Args:
        checkpoint: as for `find_checkpoint`, or its result.
        vae: folder or Hub id of another VAE than the checkpoint's, or of the VAE for bare weights.
        text_encoder: likewise for text encoder and tokenizer.
        text_8bit: load the text encoder's weights in 8 bits.
        low_memory: leave out the text encoder (`attach_text_encoder` adds it) and keep the rest in main memory.
        loras: LoRA adapters, each with the factor of its update; see `stdit_model.weights.adapters.load_adapters`.
        offload: see `offload_pipeline`.

    Raises:
        ConfigError: the checkpoint cannot be found, read or fetched, bitsandbytes is missing for 8 bits, or there is
            no GPU to offload from.
        WeightsError: one of its parts cannot be, or an adapter is of another model.
        SettingsError: peft, which adapters need, is missing.
    """
    if text_8bit:
        _eight_bits()  # fails before minutes of loading
    found = checkpoint if isinstance(checkpoint, CheckpointSource) else find_checkpoint(checkpoint)
    require({part: source for part, source in (("vae", vae), ("text_encoder", text_encoder)) if source is not None})
    device = find_device()
    if device.type == "cpu":
        keep_freed_memory()
    if offload is not None and device.type == "cpu":
        raise ConfigError(f"`offload={offload}`: this machine computes on the CPU, where all weights are; leave it out")
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
        sources = {"vae": vae, "text_encoder": text_encoder}
        options = {**{part: source for part, source in sources.items() if source is not None}, **options}
        pipeline = STDiTPipeline.from_released(found.source, dtype=dtype, **options)
    else:
        if vae is not None:
            options["vae"] = load_part("vae", vae)
        if text_encoder is not None and "text_encoder" not in options:
            options["text_encoder"] = load_part("text_encoder", text_encoder, dtype=dtype)
            options["tokenizer"] = load_part("tokenizer", text_encoder)
        pipeline = STDiTPipeline.from_pretrained(found.source, dtype=dtype, **options)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, *([] if low_memory or text_8bit else [pipeline.text_encoder])):
        torch.nn.Module.to(part, dtype)  # parts loaded above, and those whose type older diffusers ignore
    load_adapters(pipeline.transformer, loras)
    if offload is not None:
        return offload_pipeline(pipeline, offload, device)
    return pipeline if low_memory else pipeline.to(device)


def offload_pipeline(pipeline: STDiTPipeline, way: str, device: torch.device) -> STDiTPipeline:
    """Keep a pipeline's weights in main memory, except for those that are computed with; the videos stay the same.

    Args:
        pipeline: in main memory.
        way: "model" for one component at a time on the device; "group" for one block of the transformer at a time, the
            next one being copied meanwhile, beside the whole VAE; "sequential" for one layer at a time, the slowest.
        device: to compute on.
    """
    if way == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(
            device, num_blocks_per_group=1, use_stream=device.type == "cuda", exclude_modules="vae"
        )
    return pipeline


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
    return own_parts(found.source).get("text_encoder", T5_ID)


def _load_text_encoder(found: CheckpointSource, text_encoder: str | None, dtype: torch.dtype, text_8bit: bool) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if text_8bit:
        options |= {"quantization_config": _eight_bits(), "device_map": {"": find_device()}}
    return load_part("text_encoder", _text_source(found, text_encoder), **options)


def _eight_bits() -> Any:
    return eight_bit_config("--text-8bit", "--low-memory alone")
