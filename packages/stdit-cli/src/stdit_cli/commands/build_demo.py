"""`stdit build-demo`: build the bundled demo model from scratch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from stdit_cli.console import TrainingBar
    from stdit_train.curriculum import Stage


def build_demo(
    out: Annotated[Path, typer.Argument(help="Folder to build in; finished parts in it are kept.")],
    vae_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps of each phase of the VAE.", show_default="the recipe's"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps of each of the transformer's stages.", show_default="the recipe's"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time budget of the transformer in minutes, instead of steps.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per split (seen, held-out) for scoring.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed for weights, data order and noise.")] = 0,
) -> None:
    """Train the demo model's VAE, text encoder and transformer, score it, and write OUT/demo with a model card.

    Run the same command again to resume an interrupted build.
    """
    from rich.console import Console

    from stdit_cli.commands.evaluate import SPLITS, VAE_CLIPS, score_splits, score_table
    from stdit_cli.console import INTERRUPTED, CountingBar, TrainingBar
    from stdit_data.datasets.shapes import ShapesDataset
    from stdit_data.storage.atomic import write_atomically
    from stdit_train.config.load import load_curriculum
    from stdit_train.curriculum import Stage, stage_folder, train_stages
    from stdit_train.demo.autoencoder import AutoencoderConfig
    from stdit_train.demo.build import build_decoder, build_parts, model_card, publish
    from stdit_train.demo.decoder import DecoderConfig
    from stdit_train.evaluation.evaluate import reference_clips
    from stdit_train.evaluation.outline import OutlineQuality
    from stdit_train.evaluation.video_metrics import reconstruction
    from stdit_train.pipeline.load import load_pipeline

    console = Console(highlight=False)
    final = out / "demo"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: name a folder to build in")
    if final.exists():
        raise ConfigError(f"{final} already exists: remove it, or name another folder")
    parts = out / "parts"
    overrides: dict[str, Any] = {"data.vae": str(parts), "data.text_encoder": str(parts)}
    overrides |= {"learn/seed": seed, "go-on/seed": seed + 1}  # other clips and noise; the weights are carried over
    if minutes is not None:
        overrides |= {"steps": 10**6, "learn/minutes": minutes / 3, "go-on/minutes": minutes * 2 / 3}
    configs = load_curriculum("demo", overrides | ({"steps": steps} if steps else {}))
    config = configs[-1]
    vae_config = AutoencoderConfig(seed=seed, size=config.data.height)
    decoder_config = DecoderConfig(seed=seed)
    if vae_steps:
        vae_config = replace(vae_config, steps=vae_steps, decoder_steps=vae_steps)
        decoder_config = replace(decoder_config, steps=vae_steps, sampled_clips=vae_steps)

    with CountingBar(console, "steps", transient=False) as bar:
        total = vae_config.steps + vae_config.decoder_steps
        task = bar.add_task("VAE", total=total, visible=not (parts / "vae").exists())
        build_parts(
            parts,
            vae_config,
            config.model.model_max_length,
            lambda step, _: bar.update(task, completed=step),
        )
    runs = [stage_folder(out / "run", number, config) for number, config in enumerate(configs, start=1)]
    stages = [Stage(config, config, run) for config, run in zip(configs, runs, strict=True)]
    with ExitStack() as bars:

        def watch(number: int, stage: Stage) -> TrainingBar:
            bars.close()
            console.print(f"transformer, stage {number} of {len(stages)}: {stage.config.stage}")
            return bars.enter_context(TrainingBar(console))

        _, outcome = train_stages(stages, watch)
    if outcome is not None and outcome.interrupted:
        console.print("stopped and saved; run the same command again to resume")
        raise typer.Exit(INTERRUPTED)

    if not (out / "decoder").exists():
        with CountingBar(console, transient=False) as bar:
            clips = bar.add_task("sampled clips", total=decoder_config.sampled_clips)
            task = bar.add_task("decoder steps", total=decoder_config.steps)
            build_decoder(
                out / "decoder",
                load_pipeline(str(runs[-1].pipeline)),
                decoder_config,
                lambda done: bar.update(clips, completed=done),
                lambda step, _: bar.update(task, completed=step),
            )
    with write_atomically(final) as candidate:
        publish(runs[-1].pipeline, out / "decoder", candidate)
        pipeline = load_pipeline(str(candidate))
        scores = score_splits(console, pipeline, list(SPLITS), prompts, measures=lambda name: [OutlineQuality()])
        true_clips = reference_clips(ShapesDataset(split="val"), VAE_CLIPS)
        ceiling = reconstruction(pipeline.vae, true_clips, [OutlineQuality()])
        pictures = score_splits(console, pipeline, list(SPLITS), prompts, frames=1)
        card = model_card(pipeline, configs, [run.reached() for run in runs], minutes, scores, pictures, ceiling)
        (candidate / "README.md").write_text(card)
    console.print(score_table(scores))
    console.print(f"{final}")
