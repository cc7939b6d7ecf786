"""`stdit report`: loss curves and an HTML page for one or more runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a curriculum's folder stands for its stages.")],
    out: Annotated[Path, typer.Option(help="Folder for loss.png and report.html.")] = Path("report"),
) -> None:
    """Plot loss curves together, and write a self-contained HTML page with sampled videos and settings."""
    from stdit_cli.console import plain_console
    from stdit_train.report.run_report import write_report

    for file in write_report(runs, out):
        plain_console().print(f"{file}")
