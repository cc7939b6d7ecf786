"""What `stdit train` shows: lines before the run, a progress bar along it, a summary after it."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typer import Exit

from stdit_cli.assets import resolve
from stdit_train.config import ConfigError, TrainConfig, from_dict, load_stage, parse_overrides, set_values, to_dict
from stdit_train.run_folder import RunFolder, free_run_folder, newest_run

INTERRUPTED = 130


def run_training(
    stage: str,
    named: dict[str, Any],
    settings: list[str],
    out: Path | None,
    root: Path,
    *,
    resume: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Resolve the configuration, check that it fits, train, and say what came out."""
    console = Console(highlight=False)
    overrides = {**named, **parse_overrides(settings)}
    if resume:
        run = RunFolder(out or newest_run(root, stage))
        config = from_dict(set_values(run.read_config(), overrides))
    else:
        run = RunFolder(out or free_run_folder(root, stage))
        config = with_demo_parts(load_stage(stage, overrides), overrides)
    if dry_run:
        show_plan(console, config)
        return
    fitting = fitted(console, config, force)
    if resume:
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise ConfigError(f"{run.path} has no checkpoint yet: start anew without --resume, with another --out")
    else:
        checkpoint = None
        run.check_free()
    announce(console, config, run)

    from stdit_train.setup import build_trainer

    with TrainingBar(console) as bar:
        trainer = build_trainer(fitting, run, bar)
        if checkpoint is None:
            run.create(config)
        else:
            trainer.resume(checkpoint)
            run.write_config(config)
            console.print(f"going on from {checkpoint}")
        outcome = trainer.train()
    if not outcome.finished:
        console.print(f"stopped at step {outcome.step}, saved. Go on with: stdit train --resume --out {run.path}")
        raise Exit(INTERRUPTED)
    console.print(f"done: {outcome.step} steps. Losses in {run.loss_plot}, samples in {run.samples}")
    console.print(f'try it: stdit sample "a red circle moving left" --checkpoint {run.path}')


def with_demo_parts(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """`shapes` goes with the demo's own VAE and text encoder unless others are named; "demo" becomes its folder."""
    values = to_dict(config)
    for part in ("vae", "text_encoder"):
        named = overrides.get(f"data.{part}")
        if config.data.source == "shapes" and named is None:
            values["data"][part] = "demo"
        values["data"][part] = resolve(values["data"][part])
    if config.data.source != "shapes":
        values["data"]["remember_latents"] = False  # clips start at random places: no two epochs see the same frames
    return from_dict(values)


def announce(console: Console, config: TrainConfig, run: RunFolder) -> None:
    """What is about to happen, a line each."""
    demo = resolve("demo")
    data = config.data
    clips = f"{data.frames}x{data.height}x{data.width}"
    source = "the embedded set `shapes` (--data FOLDER trains on videos)" if data.source == "shapes" else data.source
    console.print(f"stage {config.stage}: {config.model.preset} {config.model.variant}, {clips}, on {source}")
    bundled = [name for name, part in (("VAE", data.vae), ("text encoder", data.text_encoder)) if part == demo]
    if bundled:
        options = {"VAE": "--vae", "text encoder": "--text-encoder"}
        others = " and ".join(options[name] for name in bundled)
        console.print(f"with the demo's {' and '.join(bundled)}; {others} takes another")
    console.print(f"run folder: {run.path}")


def show_plan(console: Console, config: TrainConfig) -> None:
    """The resolved configuration and what the run takes."""
    import json

    from stdit_train.estimate import available_memory, describe, estimate_run, refusal

    available = available_memory()
    estimate = estimate_run(config, available)
    console.print_json(json.dumps(to_dict(config)))
    for line in describe(estimate):
        console.print(line)
    console.print(refusal(estimate, available) or "fits here")


def fitted(console: Console, config: TrainConfig, force: bool) -> TrainConfig:
    """The configuration with the micro-batch that fits here; refused, before anything is allocated, if none does."""
    from stdit_train.estimate import available_memory, estimate_run, refusal, with_micro_batch

    available = available_memory()
    estimate = estimate_run(config, available)
    message = refusal(estimate, available)
    if message and not force:
        raise ConfigError(f"{message} (--force starts all the same)")
    if estimate.micro_batch < config.global_batch:
        parts = config.global_batch // estimate.micro_batch
        console.print(f"batch {config.global_batch}: {parts} parts of {estimate.micro_batch}, accumulated")
    return with_micro_batch(config, estimate)


class TrainingBar:
    """The progress bar of a run: a `Watcher`."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.quiet = quiet  # no lines above the bar
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.1f} samples/s  {task.fields[left]} left"),
            TimeElapsedColumn(),
            console=console,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def started(self, step: int, steps: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=steps, completed=step, loss=float("nan"), rate=0.0, left="?")
        self.seconds = 0.0
        self.first_progress: float | None = None
        self.loss: float | None = None

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Move the bar; loss and rate are smoothed."""
        assert self.task is not None
        loss = values["loss"]
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        task = self.bar.tasks[0]
        elapsed = task.elapsed or 0.0
        if self.first_progress is None:
            self.first_progress, self.first_elapsed = progress, elapsed
        done = progress - self.first_progress
        left = (elapsed - self.first_elapsed) * (1.0 - progress) / done if done > 0 else None
        before = task.fields["rate"]
        rate = values["samples_per_second"]
        rate = rate if not before else 0.95 * before + 0.05 * rate
        self.bar.update(self.task, completed=step, loss=self.loss, rate=rate, left=clock(left))

    def said(self, line: str) -> None:
        """A line above the bar."""
        if self.quiet:
            return
        self.bar.console.print(line)


def clock(seconds: float | None) -> str:
    """1:02:03, 4:05, or ? when it isn't known."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
