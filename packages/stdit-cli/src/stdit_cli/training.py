"""What `stdit train` shows: lines before the run, a progress bar along it, a summary after it."""

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from typer import Exit

from stdit_cli.console import INTERRUPTED, TrainingBar, plain_console
from stdit_train.assets import DEMO
from stdit_train.config.load import to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.curriculum import RunPlan, Stage, TrainOptions, find_run, train_stages

if TYPE_CHECKING:
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.distributed.world import World

__all__ = ["TrainRequest", "run_training"]
ENDED = 1  # exit code of a run that could not go on


@dataclass(frozen=True)
class TrainRequest:
    """The options of `stdit train`."""

    options: TrainOptions
    dry_run: bool
    force: bool
    nproc: int = 1


def run_training(request: TrainRequest) -> None:
    """Resolve the configuration, check that it fits, train, and say what came out.

    Every process of a run comes here; the first decides what they do, prints and writes.
    """
    from stdit_train.distributed.world import World

    console = plain_console()
    if request.dry_run:
        for config in find_run(request.options).configs:
            show_plan(console, config, request.nproc)
        return
    # A wrong setting is told before torch is imported; of many processes the first alone looks.
    plan = find_run(request.options) if World.from_env().size == 1 else None
    if plan is not None and request.nproc > 1:
        code = launched(console, request, plan)
    else:
        with World.from_env() as world:
            console.quiet = not world.is_main
            code = trained(console, request, plan, world)
    if code:
        raise Exit(code)


def trained(console: Console, request: TrainRequest, plan: RunPlan | None, world: "World") -> int:
    """This process's part of a run, or of a curriculum; the exit code."""
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.components.load import check_sources
    from stdit_train.errors import RunEnded
    from stdit_train.estimate.training import fit_to_memory
    from stdit_train.tracking.metrics import check_wandb

    def prepare() -> tuple[RunPlan, list[Stage]]:
        run_plan = plan or find_run(request.options)
        if request.options.resume is None:
            RunFolder(run_plan.folder).check_free()
        check_wandb(next((config.wandb for config in run_plan.configs if config.wandb), None))
        stages = []
        for config, run in zip(run_plan.configs, run_plan.runs, strict=True):
            check_sources(config)
            before = run.notes().get("micro_batch")
            fit = fit_to_memory(config, world.size, micro_batch=before, force=request.force)
            for line in fit.notes:
                console.print(line)
            stages.append(Stage(config, fit.config, run))
        if run_plan.curriculum is not None:
            names = ", then ".join(config.stage for config in run_plan.configs)
            console.print(f"curriculum {run_plan.curriculum}: {names}")
        run_plan.save()
        return run_plan, stages

    (folder, name, _), stages = world.broadcast_from_main(prepare)
    with ExitStack() as bars:

        def watch(number: int, stage: Stage) -> TrainingBar:
            bars.close()
            if name is not None:
                console.print(f"stage {number} of {len(stages)}")
            announce(console, stage.config, stage.run)
            return bars.enter_context(TrainingBar(console))

        try:
            number, outcome = train_stages(stages, watch, world)
        except RunEnded as error:
            bars.close()
            console.print(f"stdit: {error}")
            console.print(f"go on with: {resume_command(folder, request.nproc)}", soft_wrap=True)
            raise Exit(ENDED) from error
    run = stages[number - 1].run
    if outcome is not None and not outcome.finished:
        command = resume_command(folder, request.nproc)
        console.print(f"stopped at step {outcome.step}, saved. Go on with: {command}", soft_wrap=True)
        return 128 + outcome.signal if outcome.signal else INTERRUPTED
    steps = f"{outcome.step} steps" if outcome else "nothing left to do"
    console.print(f"done: {steps}. Losses in {run.loss_plot}, samples in {run.samples}")
    console.print(
        f'try it: stdit sample "a red circle moving left" --checkpoint {shlex.quote(str(run.path))}', soft_wrap=True
    )
    return 0


def launched(console: Console, request: TrainRequest, plan: RunPlan) -> int:
    """The same in several processes, once it is known that the run can be shared by them; the exit code."""
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.distributed.launch import launch
    from stdit_train.distributed.mesh import parallel_dims

    if request.options.resume is None:
        RunFolder(plan.folder).check_free()
    for config in plan.configs:
        parallel_dims(config, request.nproc)
    ended = launch(request.nproc, [sys.executable, "-m", "stdit_cli", *sys.argv[1:]])
    if ended.message is not None:
        print(f"stdit: {ended.message}", file=sys.stderr)
        if plan.folder.exists():
            console.print(f"go on with: {resume_command(plan.folder, request.nproc)}", soft_wrap=True)
    return ended.code


def resume_command(folder: Path, nproc: int = 1) -> str:
    """What goes on with a run."""
    return f"stdit train --resume {shlex.quote(str(folder))}" + (f" --nproc {nproc}" if nproc > 1 else "")


def announce(console: Console, config: TrainConfig, run: "RunFolder") -> None:
    """What is about to happen, a line each."""
    data = config.data
    clips = f"{data.frames}x{data.height}x{data.width}"
    source = "the embedded set `shapes` (--data FOLDER trains on videos)" if data.source == "shapes" else data.source
    console.print(f"stage {config.stage}: {config.model.preset} {config.model.variant}, {clips}, on {source}")
    bundled = [name for name, part in (("VAE", data.vae), ("text encoder", data.text_encoder)) if part == DEMO]
    if bundled:
        options = {"VAE": "--vae", "text encoder": "--text-encoder"}
        others = " and ".join(options[name] for name in bundled)
        take = "take others" if len(bundled) > 1 else "takes another"
        console.print(f"with the demo's {' and '.join(bundled)}; {others} {take}")
    console.print(f"run folder: {run.path}")


def show_plan(console: Console, config: TrainConfig, nproc: int = 1) -> None:
    """The resolved configuration and what the run takes, on each process."""
    import json

    from stdit_train.distributed.mesh import parallel_dims
    from stdit_train.estimate.training import describe, estimate_run, refusal
    from stdit_train.hardware import available_memory

    available = available_memory()
    estimate = estimate_run(config, available, parallel_dims(config, nproc))
    console.print_json(json.dumps(to_dict(config)))
    for line in describe(estimate):
        console.print(line)
    console.print(refusal(estimate, available) or "fits here")
