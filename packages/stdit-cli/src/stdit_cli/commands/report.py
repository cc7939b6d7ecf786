"""`stdit report`: curves and a page on one run or several."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a schedule's folder stands for its stages.")],
    out: Annotated[Path, typer.Option(help="Folder of loss.png and report.html.")] = Path("report"),
) -> None:
    """Overlay loss curves and write one self-contained HTML page with sampled videos and settings."""
    from stdit_cli.console import plain_console
    from stdit_train.report.run_report import write_report

    for file in write_report(runs, out):
        plain_console().print(f"{file}")
