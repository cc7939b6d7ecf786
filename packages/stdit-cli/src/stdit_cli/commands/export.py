"""`stdit export`: a run's checkpoint as a pipeline folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder; of a schedule's folder the last stage.")],
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write.")],
    raw: Annotated[bool, typer.Option("--raw", help="The weights themselves, not their average (EMA).")] = False,
    step: Annotated[int | None, typer.Option(help="Of which checkpoint; the newest unless given.")] = None,
    half: Annotated[bool, typer.Option("--half", help="The transformer in bfloat16.")] = False,
) -> None:
    """Write what `stdit sample --checkpoint OUT` loads."""
    from stdit_cli.console import plain_console
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.pipeline.export import export_run

    saved = export_run(RunFolder(run), RunFolder(out), raw=raw, step=step, half=half)
    kind = "weights" if raw else "average weights (EMA)"
    plain_console().print(f"{out}: the {kind} of step {saved}")
