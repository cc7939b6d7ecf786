"""Build the bundled demo model: VAE, text encoder, published weights, model card."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from stdit_data.datasets.shapes import triples, vocabulary
from stdit_data.storage.atomic import write_atomically
from stdit_model import STDiTPipeline
from stdit_train.config.schema import TrainConfig
from stdit_train.demo.autoencoder import AutoencoderConfig, train_autoencoder
from stdit_train.demo.decoder import DecoderConfig, sample_frames, train_decoder_on_samples
from stdit_train.demo.text import build_text_encoder, build_tokenizer
from stdit_train.evaluation.confidence import Interval
from stdit_train.evaluation.evaluate import Scores


def build_parts(
    folder: Path, config: AutoencoderConfig, text_tokens: int, on_step: Callable[[int, float], None]
) -> None:
    """Build `vae`, `text_encoder` and `tokenizer` in a folder; those that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        tokenizer = build_tokenizer(vocabulary(), text_tokens)
        build_text_encoder(len(tokenizer), seed=config.seed).save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    if not (folder / "vae").exists():
        vae = train_autoencoder(config, on_step)
        with write_atomically(folder / "vae") as partial:
            vae.save_pretrained(partial)


def build_decoder(
    folder: Path,
    pipeline: STDiTPipeline,
    config: DecoderConfig,
    on_clip: Callable[[int], None],
    on_step: Callable[[int, float], None],
) -> None:
    """Train the VAE's decoder on what a pipeline samples, and save the VAE in `folder`, which must not exist.

    Where no sample shows what its prompt says, as after very few steps, the VAE stays as it is.
    """
    sampled = sample_frames(pipeline, config, on_clip)
    vae = train_decoder_on_samples(pipeline.vae, sampled, config, on_step) if len(sampled) else pipeline.vae
    with write_atomically(folder) as partial:
        vae.save_pretrained(partial)


def publish(source: Path, vae: Path, destination: Path) -> None:
    """Copy a finished pipeline with another VAE, all weights in bfloat16."""
    shutil.rmtree(destination, ignore_errors=True)
    pipeline = STDiTPipeline.from_pretrained(source, vae=AutoencoderKL.from_pretrained(vae))
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.to(torch.bfloat16)
    pipeline.save_pretrained(destination)
    for file in (destination / "model_index.json", *destination.glob("*/config.json")):
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:  # the path of the build is of no use elsewhere
            file.write_text(json.dumps(content, indent=2) + "\n")


def model_card(
    pipeline: Any,
    configs: list[TrainConfig],
    reached: list[tuple[int, float]],
    minutes: float | None,
    scores: dict[str, Scores],
    pictures: dict[str, Scores],
    ceiling: dict[str, Interval],
) -> str:
    """Return the model card in Markdown: data, command, seed, steps, hardware, scores.

    Args:
        pipeline: the finished pipeline.
        configs: settings of the transformer's runs, in order.
        reached: steps and seconds of these runs.
        minutes: time budget of all runs together; None for none.
        scores: scores of videos by split, with `OutlineQuality`.
        pictures: scores of single frames by split.
        ceiling: `reconstruction` of true clips, with `OutlineQuality`.
    """

    def count(part: torch.nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in part.parameters()):,}"

    rows = "\n".join(
        f"| {split} | {len(found.trials)} | "
        + " | ".join(f"{s['share']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for s in found.shares.values())
        + " |"
        for split, found in scores.items()
    )
    decoded = {name.removeprefix("VAE "): interval for name, interval in ceiling.items()}
    outlines = {split: found.measures for split, found in scores.items()} | {"true clips after the VAE": decoded}
    names = [name for name in decoded if any(name in found.measures for found in scores.values())]
    shapes = "\n".join(
        f"| {split} | " + " | ".join(found[name].text() if name in found else "" for name in names) + " |"
        for split, found in outlines.items()
    )
    single = " and ".join(f"{found.shares['all']['share']:.3f} ({split})" for split, found in pictures.items())
    config, data = configs[0], configs[0].data
    size = f"{data.frames} frames of {data.height}x{data.width}"
    lengths = (f"{steps} steps ({seconds / 60:.0f} minutes)" for steps, seconds in reached)
    schedule = f"{' and then '.join(lengths)} of {config.global_batch} clips"
    parts = [
        (f"transformer: STDiT ({config.model.variant}), rectified flow", count(pipeline.transformer), schedule),
        ("vae: AutoencoderKL, 8x down", count(pipeline.vae), "single frames of the set, its decoder then on samples"),
        ("text_encoder: T5EncoderModel", count(pipeline.text_encoder), "random weights, frozen"),
        ("tokenizer", "", f"one token per word, {len(vocabulary())} words"),
    ]
    table = "\n".join(f"| {part} | {size} | {how} |" for part, size, how in parts)
    held_out, seen = len(triples("heldout")), len(triples("train"))
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    budget = f" --minutes {minutes:g}" if minutes else ""
    return f"""# The demo model

Text to video of coloured shapes, {size} pixels at {data.fps:g} frames per second. It exists so that every part
of stdit can be tried on a laptop; it was trained on the embedded set `shapes` alone.

| part | parameters | made by |
|---|---|---|
{table}

Data: `shapes`, generated on the fly, {seen} colour-shape-motion triples; {held_out} more are held out of training.
Command: `stdit build-demo OUT{budget}` (seed {config.seed}). Hardware: {hardware}.
Weights are stored in bfloat16; the scores below are those of the stored weights.

Prompt following (`stdit eval`, share of prompts with 95 % interval):

| prompts | number | all correct | colour | shape | motion |
|---|---|---|---|---|---|
{rows}

With `--frames 1`, colour and shape are right in {single}. How well the shapes are drawn (the same videos):

| prompts | {" | ".join(names)} |
|---|{"---|" * len(names)}
{shapes}

Licence: Apache-2.0, like the rest.
"""
