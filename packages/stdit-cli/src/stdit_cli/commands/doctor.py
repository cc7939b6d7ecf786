"""`stdit doctor`: show the device and software of this machine, and the stages that fit."""

from pathlib import Path


def doctor() -> None:
    """Show device, memory, bf16, compiler, versions, disk and hub, and which stages can be trained here."""
    from stdit_cli.console import plain_console
    from stdit_train.assets import demo_folder
    from stdit_train.config.load import load_stage, stage_names
    from stdit_train.config.resolve import resolve_config
    from stdit_train.estimate.doctor import examine, stages_that_fit

    console = plain_console()
    for name, fact in examine(Path.cwd()).items():
        console.print(f"{name:<10} {fact}")
    console.print(
        f"{'demo':<10} {'bundled model found' if (demo_folder() / 'model_index.json').exists() else 'missing'}"
    )
    configs = [resolve_config(load_stage(name), {}, demo_parts=False) for name in stage_names()]
    for name, refusal in stages_that_fit(configs).items():
        console.print(f"  {name:<10} {refusal or 'fits'}")
