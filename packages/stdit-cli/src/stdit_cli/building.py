"""What `stdit build-demo` does: parts, transformer, scores, publication."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer import Exit

from stdit_cli.evaluate import SPLITS, score_splits, score_table
from stdit_cli.training import INTERRUPTED, TrainingBar
from stdit_train.autoencoder import AutoencoderConfig
from stdit_train.config import load_stage
from stdit_train.demo import build_parts, publish, write_card
from stdit_train.loading import load_pipeline
from stdit_train.run_folder import RunFolder
from stdit_train.setup import open_trainer


def run_build(
    out: Path, vae_steps: int | None, steps: int | None, minutes: float | None, prompts: int, seed: int
) -> None:
    """Build in `out`: parts/, run/, demo/."""
    console = Console(highlight=False)
    final = out / "demo"
    if final.exists():
        raise FileExistsError(f"{final} is built already: remove it, or name another folder")
    parts, run = out / "parts", RunFolder(out / "run")
    overrides: dict[str, Any] = {"seed": seed, "data.vae": str(parts), "data.text_encoder": str(parts)}
    if minutes is not None:
        overrides |= {"minutes": minutes, "steps": 10**6}
    config = load_stage("demo", overrides | ({"steps": steps} if steps else {}))
    vae_config = AutoencoderConfig(seed=seed, size=config.data.height)
    vae_config = replace(vae_config, steps=vae_steps, decoder_steps=vae_steps) if vae_steps else vae_config

    columns = (TextColumn("VAE"), BarColumn(), MofNCompleteColumn(), TextColumn("error {task.fields[error]:.5f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        total = vae_config.steps + vae_config.decoder_steps
        task = bar.add_task("", total=total, error=float("nan"), visible=not (parts / "vae").exists())
        build_parts(
            parts,
            vae_config,
            config.model.model_max_length,
            lambda step, error: bar.update(task, completed=step, error=error),
        )
    with TrainingBar(console) as watcher:
        trainer = open_trainer(config, config, run, watcher)
        outcome = trainer.train()
    if not outcome.finished:
        console.print("stopped, saved; the same command goes on from here")
        raise Exit(INTERRUPTED)

    candidate = out / ".demo.partial"
    publish(run.pipeline, candidate)
    scores = score_splits(console, load_pipeline(str(candidate)), list(SPLITS), prompts)
    write_card(candidate, config, outcome.step, trainer.elapsed, scores)
    candidate.rename(final)
    console.print(score_table(scores))
    console.print(f"{final}")
