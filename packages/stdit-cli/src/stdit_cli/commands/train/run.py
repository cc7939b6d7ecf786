"""Carry out `stdit train`: train a stage, or several in order."""

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.config.schema import TrainConfig
    from stdit_train.curriculum import RunPlan, Stage, TrainOptions
    from stdit_train.distributed.world import World

ENDED = 1  # exit code of a run that could not go on


@dataclass(frozen=True)
class TrainRequest:
    """The options of `stdit train`."""

    options: "TrainOptions"
    force: bool
    nproc: int


def run_training(request: TrainRequest) -> None:
    """Resolve the settings, check that the run fits, train, and print the result.

    Every process of a run comes here; rank 0 resolves, prints and writes.
    """
    from stdit_cli.console import plain_console
    from stdit_train.curriculum import find_run
    from stdit_train.distributed.world import World

    console = plain_console()
    # A wrong setting is reported before torch is imported; of several processes only rank 0 checks.
    plan = find_run(request.options) if World.from_env().size == 1 else None
    if plan is not None and plan.resumed and plan.finished:
        tell_finished(console, plan, request.nproc)
        return
    if plan is not None and request.nproc > 1:
        code = launch_processes(console, request, plan)
    else:
        with World.from_env() as world:
            console.quiet = not world.is_main
            code = train_here(console, request, plan, world)
    if code:
        raise typer.Exit(code)


def train_here(console: "Console", request: TrainRequest, plan: "RunPlan | None", world: "World") -> int:
    """Train as one process of a run, and return the exit code.

    Args:
        console: of rank 0; quiet on the others.
        request: the options.
        plan: the run, unless rank 0 is still to resolve it.
        world: the processes.
    """
    with ExitStack() as held:
        prepared = world.broadcast_from_main(lambda: prepare(console, request, plan, world.size, held))
        return train_prepared(console, request, world, *prepared) if prepared[2] else 0


def train_prepared(
    console: "Console",
    request: TrainRequest,
    world: "World",
    folder: Path,
    curriculum: str | None,
    stages: "list[Stage]",
) -> int:
    """Train the stages of a run that `prepare` returned, print how they end, and return the exit code."""
    from stdit_cli.console import TrainingBar
    from stdit_train.curriculum import train_stages
    from stdit_train.errors import RunEnded

    with ExitStack() as bars:

        def watch(number: int, stage: "Stage") -> TrainingBar:
            bars.close()
            if curriculum is not None:
                console.print(f"stage {number} of {len(stages)}")
            announce(console, stage.config, stage.run)
            return bars.enter_context(TrainingBar(console))

        try:
            number, outcome = train_stages(stages, watch, world)
        except RunEnded as error:
            bars.close()
            console.print(f"stdit: {error}")
            console.print(f"resume with: {resume_command(folder, request.nproc)}", soft_wrap=True)
            raise typer.Exit(ENDED) from error
    run = stages[number - 1].run
    if outcome is not None and not outcome.finished:
        command = resume_command(folder, request.nproc)
        console.print(f"stopped at step {outcome.step}, saved. Resume with: {command}", soft_wrap=True)
        return stopped_code(outcome.signal)
    assert outcome is not None  # a finished run has not come so far
    console.print(f"done: {outcome.step} steps. Losses in {run.loss_plot}, samples in {run.samples}")
    if stages[number - 1].config.network == "vae":
        vae = shlex.quote(str(run.path))
        console.print(f"measure it: stdit eval {vae}; train an STDiT on it: --vae {vae}", soft_wrap=True)
        return 0
    captions = [prompt for prompt in outcome.prompts if prompt.strip()] or ["PROMPT"]
    prompt, path = shlex.quote(min(captions, key=len)), shlex.quote(str(run.path))
    config = stages[number - 1].config
    if config.lora.rank is None:
        options = f"--checkpoint {path}"
    else:
        options = f"--checkpoint {shlex.quote(str(config.init))} --lora {path}"
    console.print(f"try it: stdit sample {prompt} {options}", soft_wrap=True)
    return 0


def stopped_code(signal: int | None) -> int:
    """Return the exit code of a run that was stopped and has saved.

    It is that of shells, 128 + the signal's number, and 0 under torchrun, which takes any other for a failure.
    """
    from stdit_cli.console import INTERRUPTED
    from stdit_train.distributed.launch import LAUNCHED

    if "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHED not in os.environ:
        return 0
    return 128 + signal if signal else INTERRUPTED


def prepare(
    console: "Console", request: TrainRequest, plan: "RunPlan | None", processes: int, held: ExitStack
) -> "tuple[Path, str | None, list[Stage]]":
    """Check a run, choose its micro-batches and lock its folder; return folder, curriculum's name and stages.

    No stages are returned for a run that is finished. The lock is released with `held`.
    """
    from stdit_train.checkpoint.lock import lock_folder
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.components.sources import check_inputs
    from stdit_train.config.resolve import shapes_only
    from stdit_train.curriculum import Stage, find_run
    from stdit_train.tracking.metrics import check_wandb

    plan = plan or find_run(request.options)
    if not plan.resumed:
        RunFolder(plan.folder).check_free()
    elif plan.finished:
        tell_finished(console, plan, processes)
        return plan.folder, plan.curriculum, []
    check_wandb(next((config.wandb for config in plan.configs if config.wandb), None))
    for config, run in zip(plan.configs, plan.runs, strict=True):
        check_inputs(config, begun=run.config_file.exists())
    for line in dict.fromkeys(filter(None, map(shapes_only, plan.configs))):
        console.print(line, soft_wrap=True)

    from stdit_train.estimate.fit import fit_to_memory

    stages = []
    for config, run in zip(plan.configs, plan.runs, strict=True):
        fit = fit_to_memory(config, processes, micro_batch=run.metadata().get("micro_batch"), force=request.force)
        for line in fit.notes:
            console.print(line)
        stages.append(Stage(config, fit.config, run))
    if plan.curriculum is not None:
        console.print(f"curriculum {plan.curriculum}: {', then '.join(config.stage for config in plan.configs)}")
    held.enter_context(lock_folder(plan.folder))
    plan.save()
    return plan.folder, plan.curriculum, stages


def tell_finished(console: "Console", plan: "RunPlan", nproc: int) -> None:
    """Print that a run has ended, and the command that would continue it."""
    config, done = plan.configs[-1], plan.runs[-1].metadata()["finished_at_step"]
    key, value = ("steps", 2 * done) if done >= config.steps else ("minutes", 2 * (config.minutes or 1))
    more = f"--{key} {value:g}" if plan.curriculum is None else f"--set {config.stage}/{key}={value:g}"
    stages = f"{len(plan.configs)} stages, the last with " if plan.curriculum is not None else ""
    console.print(f"{plan.folder} is finished, with {stages}{done} steps: nothing is left to do", soft_wrap=True)
    console.print(f"train longer with: {resume_command(plan.folder, nproc)} {more}", soft_wrap=True)


def launch_processes(console: "Console", request: TrainRequest, plan: "RunPlan") -> int:
    """Run this command in several processes, once they can share the run; return the exit code."""
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.distributed.dims import parallel_dims
    from stdit_train.distributed.launch import launch

    if not plan.resumed:
        RunFolder(plan.folder).check_free()
    for config in plan.configs:
        parallel_dims(config, request.nproc)
    ended = launch(request.nproc, [sys.executable, "-m", "stdit_cli", *sys.argv[1:]])
    if ended.message is not None:
        typer.echo(f"stdit: {ended.message}", err=True)
        if plan.folder.exists():
            console.print(f"resume with: {resume_command(plan.folder, request.nproc)}", soft_wrap=True)
    return ended.code


def resume_command(folder: Path, nproc: int = 1) -> str:
    """Return the command that resumes a run."""
    return f"stdit train --resume {shlex.quote(str(folder))}" + (f" --nproc {nproc}" if nproc > 1 else "")


def announce(console: "Console", config: "TrainConfig", run: "RunFolder") -> None:
    """Print what is about to be trained: model, clips, components, run folder."""
    from stdit_train.assets import DEMO
    from stdit_train.config.resolve import model_words, shapes_only

    data = config.data
    clips = f"{data.frames}x{data.height}x{data.width}"
    model = model_words(config)
    source = "the embedded set `shapes` (--data FOLDER trains on videos)" if data.source == "shapes" else data.source
    console.print(f"stage {config.stage}: {model}, {clips}, on {source}")
    options = {"VAE": (data.vae, "--vae"), "text encoder": (data.text_encoder, "--text-encoder")}
    if config.network == "vae":
        options = {}
    bundled = {name: option for name, (source, option) in options.items() if source == DEMO}
    if bundled and shapes_only(config) is None:  # else the warning has said so
        console.print(f"with the demo's {' and '.join(bundled)}; choose others with {' and '.join(bundled.values())}")
    console.print(f"run folder: {run.path}")
