"""`stdit train --dry-run`: show what a run would need."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from stdit_train.curriculum import TrainOptions


def show_dry_run(options: "TrainOptions", nproc: int, gpu: str | None, *, verbose: bool, as_json: bool) -> None:
    """Print for each stage what it needs, as a table or as JSON, from formulas; nothing is allocated."""
    import json

    from rich.box import SIMPLE
    from rich.table import Table

    from stdit_cli.console import plain_console
    from stdit_train.assets import DEMO
    from stdit_train.components.sizes import check_clips
    from stdit_train.config.load import to_dict
    from stdit_train.curriculum import find_run
    from stdit_train.distributed.dims import parallel_dims
    from stdit_train.estimate.devices import find_device_kind

    console, reports = plain_console(), []
    published, run = find_run(options, demo_parts=False).configs, find_run(options)
    for config in () if run.resumed else published:
        check_clips(config)
    if gpu is not None and gpu != "cpu":  # whose peak is measured
        find_device_kind(gpu)

    from stdit_train.estimate.plan import dry_run
    from stdit_train.estimate.training import estimate_run

    for config, started in zip(published, run.configs, strict=True):
        report = dry_run(config, nproc, gpu)
        notes = report.notes
        if started.data != config.data:
            count = estimate_run(started, dims=parallel_dims(started, nproc)).parameters
            sources = {"VAE": started.data.vae, "text encoder": started.data.text_encoder}
            names = " and ".join(name for name, source in sources.items() if source == DEMO)
            notes.append(
                f"without --data the embedded set `shapes` is used, with the demo's {names}: {count:,} parameters"
            )
        reports.append({**report.to_dict(), "notes": notes, "settings": to_dict(started)})
        if as_json:
            continue
        table = Table(box=SIMPLE, show_header=False, padding=(0, 2, 0, 0))
        for name, value in report.rows.items():
            table.add_row(name, value)
        console.print(table)
        for note in notes:
            console.print(note)
        if verbose:
            console.print_json(json.dumps(to_dict(started)))
    if as_json:
        typer.echo(json.dumps(reports, indent=1))
