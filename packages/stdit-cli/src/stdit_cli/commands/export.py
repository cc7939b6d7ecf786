"""`stdit export`: write a run's checkpoint as a pipeline folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder; a curriculum's folder stands for its last stage.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    raw: Annotated[bool, typer.Option("--raw", help="Export the raw weights instead of the EMA.")] = False,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint to export.", show_default="the newest")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the transformer in bfloat16.")] = False,
) -> None:
    """Export a checkpoint of a run as a pipeline folder, for `stdit sample --checkpoint OUT`.

    Of a run with --lora, the adapter is written, for `stdit sample --lora OUT`.
    """
    from stdit_cli.console import plain_console
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.pipeline.export import export_run

    saved = export_run(RunFolder(run), RunFolder(out), raw=raw, step=step, half=half)
    kind = "raw" if raw else "EMA"
    plain_console().print(f"wrote {out}: {kind} weights of step {saved}")
