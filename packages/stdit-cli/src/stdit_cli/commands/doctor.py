"""`stdit doctor`: device and software of this machine, and the stages that fit."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show device, memory, bf16, compiler, versions, disk and hub, and which stages can be trained here."""
    import json

    from stdit_cli.console import plain_console
    from stdit_train.assets import demo_folder
    from stdit_train.config.load import load_stage, stage_names
    from stdit_train.config.resolve import resolve_config
    from stdit_train.estimate.doctor import estimate_stages, examine
    from stdit_train.estimate.fit import advice, shortfall
    from stdit_train.estimate.training import to_dict

    facts = examine(Path.cwd())
    found = (demo_folder() / "model_index.json").exists()
    facts["demo"] = "bundled model found" if found else "missing"
    configs = [resolve_config(load_stage(name), {}, demo_parts=False) for name in stage_names()]
    estimates, available = estimate_stages(configs)
    if as_json:
        typer.echo(json.dumps({**facts, "stages": [to_dict(estimate, available) for estimate in estimates]}, indent=1))
        return
    console = plain_console()
    for name, fact in facts.items():
        console.print(f"{name:<10} {fact}")
    console.print("stages, as published, in one process:")
    ways: dict[str, list[str]] = {}
    for estimate in estimates:
        why = shortfall(estimate, available)
        console.print(f"  {estimate.config.stage:<10} {why or 'fits'}")
        if why is not None:
            ways.setdefault(advice(estimate, available), []).append(estimate.config.stage)
    for way, names in ways.items():
        console.print(f"for {', '.join(names)}: {way}")
