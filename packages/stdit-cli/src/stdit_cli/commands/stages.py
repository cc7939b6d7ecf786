"""`stdit stages`: list the stages and curricula."""

from typing import Annotated

import typer


def stages(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all settings.")] = False) -> None:
    """List the training stages with their sizes, and the curricula that train several in a row."""
    import json

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from stdit_data.video.segments import default_sampling
    from stdit_train.config.load import curriculum_names, curriculum_summary, load_stage, stage_names, to_dict
    from stdit_train.config.resolve import model_words

    if as_json:
        curricula = [{"name": name, "about": curriculum_summary(name)} for name in curriculum_names()]
        listed = {"stages": [to_dict(load_stage(name)) for name in stage_names()], "curricula": curricula}
        typer.echo(json.dumps(listed, indent=1))
        return
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))  # narrow enough for 80 columns
    for column in ("stage", "clip", "every", "model", "loss", "steps", "batch", "rate"):
        table.add_column(column, no_wrap=True)
    for name in stage_names():
        c = load_stage(name)
        taken = default_sampling(c.data.frames, c.data.interval, c.data.target_fps)
        table.add_row(
            name,
            f"{c.data.frames}x{c.data.height}x{c.data.width}",
            str(taken.interval) if taken.interval else f"{taken.fps:g}/s",
            model_words(c),
            "L1" if c.network == "vae" else c.objective.name,
            f"{c.steps:,}",
            str(c.global_batch),
            f"{c.optimizer.lr:g}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("every: frame interval (every n-th source frame). A curriculum trains stages in a row:")
    for name in curriculum_names():
        console.print(f"--curriculum {name}: {curriculum_summary(name)}", soft_wrap=True)
