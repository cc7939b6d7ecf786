"""`stdit stages`: the published curriculum, and the demo."""


def stages() -> None:
    """List the training stages with their sizes, and the schedules that chain them."""
    from rich.console import Console
    from rich.table import Table

    from stdit_train.config import load_stage, stage_names
    from stdit_train.schedule import schedule_about, schedule_names

    table = Table("stage", "frames x size", "every nth frame", "model", "objective", "steps", "batch", "lr")
    for name in stage_names():
        c = load_stage(name)
        size = f"{c.data.frames}x{c.data.height}x{c.data.width}"
        model = f"{c.model.preset} {c.model.variant}"
        rate = f"{c.optimizer.lr:g}"
        table.add_row(
            name, size, str(c.data.interval), model, c.objective.name, f"{c.steps:,}", str(c.global_batch), rate
        )
    console = Console(highlight=False)
    console.print(table)
    for name in schedule_names():
        console.print(f"--schedule {name}: {schedule_about(name)}")
