"""Sample videos during training, and save a run as a pipeline folder."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_data.preview import contact_sheet
from stdit_data.storage.atomic import replace_text, write_atomically
from stdit_data.transforms import to_float, to_uint8
from stdit_data.video.write import write_mp4
from stdit_model import STDiT, STDiTPipeline
from stdit_model.sampling.components import HUB_COMPONENTS, INDEX
from stdit_model.sampling.schedulers import iddpm_scheduler
from stdit_model.video_vae import decode
from stdit_train.assets import resolve_source
from stdit_train.components.captions import TextMemory
from stdit_train.components.load import Components
from stdit_train.config.schema import ObjectiveConfig, TrainConfig
from stdit_train.distributed.side_work import on_every_rank
from stdit_train.distributed.world import World


def build_pipeline(model: STDiT, components: Components, config: TrainConfig) -> STDiTPipeline:
    """Build the pipeline that samples from a run's model, with the run's sizes as its defaults."""
    pipeline = STDiTPipeline(
        transformer=model,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        scheduler=build_scheduler(config.objective),
        num_frames=config.data.frames,
        height=config.data.height,
        width=config.data.width,
        fps=config.data.fps,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance,
        resampling_steps=0 if config.objective.conditioning_share else 3,
        single_frames=config.data.single_frames > 0,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_scheduler(objective: ObjectiveConfig) -> Any:
    """Build the diffusers scheduler that samples from a model trained with an objective."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if objective.name == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=objective.shift)
    return iddpm_scheduler(objective.prediction, objective.zero_terminal_snr)


def draw_samples(
    model: STDiT,
    components: Components,
    config: TrainConfig,
    prompts: list[str],
    folder: Path | None,
    step: int,
    world: World | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Path | None:
    """Sample a video per prompt, with fixed seeds, and write them as mp4 and as a contact sheet.

    The processes share the prompts, from encoding them to decoding the videos. Weights that are sharded take all
    processes in every step, so all sample equally many: what does not divide evenly is sampled twice. At most a
    micro-batch is sampled at once, which takes less memory than training on it.

    Args:
        model: the EMA weights.
        components: VAE and text encoder.
        config: the run's settings.
        prompts: what to sample; an empty one stands for the null caption.
        folder: where to write; None to write nothing, since of many processes that sample together one writes.
        step: the step, for the files' names.
        world: processes that sample together. [default: this one]
        autocast: context for the model, as in training.

    Returns:
        Path of the contact sheet; None without a folder.

    Raises:
        PartFailed: encoding, decoding or writing failed on one of several processes.
    """
    world = world or World()
    pipeline = build_pipeline(model, components, config)
    share = -(-len(prompts) // world.dp_size)
    own = [i % len(prompts) for i in range(world.dp_rank * share, (world.dp_rank + 1) * share)]
    at_once = config.micro_batch or share
    parts = components.tokenizer, components.text_encoder, components.texts
    encode = TextMemory(*parts, model.config.model_max_length, share)
    y, mask = on_every_rank(world, lambda: encode([prompts[i] for i in own]))
    for row, i in enumerate(own):
        if not prompts[i].strip():
            y[row] = model.null_caption(1, y.shape[1])[0].to(y)
    latents = []
    for start in range(0, share, at_once):
        rows = slice(start, start + at_once)
        generator = [torch.Generator().manual_seed(i) for i in own[rows]]
        with autocast():
            output: Any = pipeline(
                prompt_embeds=y[rows], prompt_attention_mask=mask[rows], generator=generator, output_type="latent"
            )
        latents.append(output.frames)
    length = config.data.frames
    videos = on_every_rank(
        world, lambda: torch.cat([to_uint8(decode(components.vae, part, frames=length)) for part in latents])
    )
    shown = world.collect(videos, -(-len(prompts) // share))

    def write() -> Path | None:
        if folder is None or shown is None:
            return None
        return _write_samples(folder, to_float(shown[: len(prompts)]), prompts, config, step)

    return on_every_rank(world, write)


def _write_samples(folder: Path, videos: Tensor, prompts: list[str], config: TrainConfig, step: int) -> Path:
    """Write videos [B, 3, T, H, W] in [-1, 1] as mp4 and as a contact sheet, and return the path of that."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "prompts.txt", "".join(" ".join(prompt.split()) + "\n" for prompt in prompts))
    for i, video in enumerate(videos):
        write_mp4(folder / f"step-{step:06d}-{i}.mp4", video, config.data.fps)
    sheet = folder / f"step-{step:06d}.png"
    with write_atomically(sheet) as partial:
        contact_sheet(list(videos), prompts).save(partial, "PNG")
    return sheet


def save_pipeline(folder: Path, model: STDiT, components: Components, config: TrainConfig) -> None:
    """Write a model and its components as a pipeline folder, whole or not at all."""
    with write_atomically(folder) as partial:
        build_pipeline(model, components, config).save_pretrained(partial)
        if components.texts is not None:
            save_text_encoder(partial, resolve_source(components.text_source))


def save_text_encoder(folder: Path, source: str) -> None:
    """Add the text encoder and tokenizer to a pipeline folder, without loading their weights.

    Args:
        folder: the pipeline folder.
        source: folder whose files are copied; a Hub id, or a folder of another machine, is recorded by name.
    """
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    if Path(source).is_dir():
        from transformers import AutoTokenizer

        parts = {part: _inner(Path(source), part) for part in ("text_encoder", "tokenizer")}
        shutil.copytree(parts["text_encoder"], folder / "text_encoder", ignore=shutil.ignore_patterns(".*"))
        tokenizer = AutoTokenizer.from_pretrained(parts["tokenizer"])
        tokenizer.save_pretrained(folder / "tokenizer")
        index["text_encoder"] = ["transformers", "T5EncoderModel"]
        index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    else:
        index[HUB_COMPONENTS] = {"text_encoder": source, "tokenizer": source}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _inner(source: Path, part: str) -> Path:
    return source / part if (source / part).is_dir() else source
