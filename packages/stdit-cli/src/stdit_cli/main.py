"""The `stdit` command: one Typer app; each command is in its own file, which is imported when the command is called.

An error that a user can cause is one line on stderr, with exit code 2, or 1 for a run that ended; --debug shows its
traceback. So is what the system refuses for a reason in `REFUSALS`. Any other error is a bug, and shows its traceback
always.
"""

import atexit
import errno
import logging
import os
import re
import signal
import sys
from io import TextIOWrapper
from typing import Annotated, Any, ClassVar, NoReturn

import typer

from stdit_cli.lazy import Lazy, LazyGroup
from stdit_cli.settings import SettingsCommand
from stdit_data import errors as data_errors
from stdit_model import errors as model_errors
from stdit_train import errors as train_errors
from stdit_train.distributed.world import World

REFUSALS = frozenset((
    errno.EACCES, errno.EPERM, errno.EROFS,  # permissions
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,  # the disk
    errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,  # the path
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,  # limits of the system
))  # fmt: skip
USER_ERRORS = (model_errors.UserError, data_errors.UserError, train_errors.UserError)


class Interrupted(Exception):
    """Ctrl-C, which Typer would end the process for without a word."""


class Commands(LazyGroup):
    """The commands of `stdit`, in the order of its help."""

    lazy: ClassVar = {
        "sample": Lazy("stdit_cli.commands.sample.command:sample", "Make videos from prompts."),
        "serve": Lazy("stdit_cli.commands.serve.command:serve", "Make videos on a page in the browser, one at a time."),
        "train": Lazy(
            "stdit_cli.commands.train.command:train",
            "Train a stage or a curriculum into a run folder: settings, losses, samples, checkpoints and the pipeline.",
            SettingsCommand,
        ),
        "stages": Lazy(
            "stdit_cli.commands.stages:stages",
            "List the training stages with their sizes, and the curricula that train several in a row.",
        ),
        "plan": Lazy(
            "stdit_cli.commands.plan:plan",
            "Show parameters, FLOPs, memory and time of a stage, from formulas and stated peak rates; nothing is "
            "allocated.",
            SettingsCommand,
        ),
        "report": Lazy(
            "stdit_cli.commands.report:report",
            "Plot loss curves together, and write a self-contained HTML page with sampled videos and settings.",
        ),
        "export": Lazy(
            "stdit_cli.commands.export:export",
            "Export a checkpoint of a run as a pipeline folder, for `stdit sample --checkpoint OUT`.",
        ),
        "doctor": Lazy(
            "stdit_cli.commands.doctor:doctor",
            "Show device, memory, bf16, compiler, versions, disk and hub, and which stages can be trained here.",
        ),
        "eval": Lazy(
            "stdit_cli.commands.evaluate:evaluate",
            "Measure how well a checkpoint follows prompts, how smooth its videos are, and how much its VAE loses.",
        ),
        "ablate": Lazy(
            "stdit_cli.commands.ablate:ablate",
            "Train arms with the same data, noise and initial weights, and compare them with paired intervals.",
            SettingsCommand,
        ),
        "build-demo": Lazy(
            "stdit_cli.commands.build_demo:build_demo",
            "Train the demo model's VAE, text encoder and transformer, score it, and write OUT/demo with a model card.",
        ),
        "data": Lazy(
            "stdit_cli.commands.data:app",
            "From raw video to a training set: curate, check, preview and encode clips.",
        ),
        "weights": Lazy("stdit_cli.commands.weights:app", "Inspect, convert and merge checkpoints."),
    }

    def invoke(self, ctx: Any) -> Any:
        """Import the command and run it.

        Raises:
            Interrupted: Ctrl-C was pressed.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error


app = typer.Typer(
    name="stdit",
    cls=Commands,
    help="Train, sample and compare text-to-video diffusion transformers (STDiT, Open-Sora 1.0).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"stdit {version('stdit-cli')} (stdit-model {version('stdit-model')})")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


def with_resumed_run(arguments: list[str]) -> list[str]:
    """Give a bare --resume the value "newest": Typer has no options with an optional value."""
    bare = [
        i
        for i, argument in enumerate(arguments)
        if argument == "--resume" and (i + 1 == len(arguments) or arguments[i + 1].startswith("-"))
    ]
    for i in reversed(bare):
        arguments = [*arguments[: i + 1], "newest", *arguments[i + 1 :]]
    return arguments


def as_options(message: str) -> str:
    """Show arguments of Python that a message names as options: `text_encoder=PATH` as --text-encoder PATH."""

    def option(found: re.Match[str]) -> str:
        value = "" if found[2] == "True" else f" {found[2]}"
        return f"--{found[1].replace('_', '-')}{value}"

    return re.sub(r"`([a-z][a-z0-9_]*)=([^`]*)`", option, message)


def fail(message: str, code: int, world: World) -> NoReturn:
    """Print one line of error on stderr, with the rank of a process that is not the main one, and exit."""
    line = " ".join(model_errors.without_numbers(as_options(message)).split())
    print(f"stdit: {'' if world.is_main else f'process {world.rank}: '}{line}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line; --debug may stand anywhere on it."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    world = World()
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # as reports show the command
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)  # else importing torchao warns of what no user can change
    try:
        world = World.from_env()
        app(with_resumed_run(sys.argv[1:]))
    except (Interrupted, KeyboardInterrupt):
        if debug:
            raise
        if world.is_main:
            print("stdit: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        if debug:
            raise
        fail(str(error), 1 if isinstance(error, train_errors.RunEnded) else 2, world)
    except OSError as error:
        if debug or error.errno not in REFUSALS:
            raise
        name = f" {error.filename}" if error.filename else ""
        fail(f"cannot read or write{name}: {error.strerror}; --debug shows where", 2, world)
    finally:  # nothing is left to stop: a second Ctrl-C would only show a traceback of the interpreter's end
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
