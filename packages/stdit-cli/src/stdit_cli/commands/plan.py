"""`stdit plan`: parameters, FLOPs, memory and time of a stage on a number of devices."""

from typing import Annotated

import typer

from stdit_cli import completion


def plan(
    stage: Annotated[
        str, typer.Option(help="Stage to plan; `stdit stages` lists them.", autocompletion=completion.stages)
    ] = "16x256",
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            help="Device: h200, h100, a100, 4090, cpu for this machine, or any card as MEMORY,RATE: 24GB,80TFLOPS.",
            autocompletion=completion.gpus,
        ),
    ] = "h100",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of the stage, e.g. global_batch=64.",
            autocompletion=completion.settings,
        ),
    ] = None,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Also show the memory needed to sample one such clip.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of ways to place the stage.")] = False,
) -> None:
    """Show parameters, FLOPs, memory and time of a stage, from formulas and stated peak rates; nothing is allocated."""
    import json

    from stdit_cli.console import plain_console
    from stdit_train.config.batches import check_shared_tokens
    from stdit_train.config.load import load_stage, parse_overrides
    from stdit_train.config.resolve import resolve_config
    from stdit_train.distributed.dims import nearest_batch
    from stdit_train.errors import ConfigError
    from stdit_train.estimate.devices import find_device_kind

    console = plain_console()
    overrides = parse_overrides(setting or [])
    config = resolve_config(load_stage(stage, overrides), overrides, demo_parts=False)
    device = find_device_kind(gpu)
    if as_json and sampling:
        raise ConfigError("--json and --sampling: give one of the two")

    from stdit_train.estimate.duration import duration
    from stdit_train.estimate.fit import advice, shortfall
    from stdit_train.estimate.plan import SHARE_OF_PEAK, plan_stage
    from stdit_train.estimate.training import describe

    ways = plan_stage(config, device, gpus)
    if as_json:
        typer.echo(json.dumps([way.to_dict(device) for way in ways], indent=1))
        return
    console.print(f"stage {stage} on {gpus} x {device.title}, {device.memory / 2**30:.1f} GiB each")
    if config.data.tokens is not None:
        try:
            check_shared_tokens(config, gpus)
        except ConfigError as error:
            console.print(f"only ways with several devices to a clip are shown: {error}", soft_wrap=True)
    elif config.global_batch % gpus:
        nearest = nearest_batch(config.global_batch, gpus)
        console.print(
            f"{gpus} devices cannot share a batch of {config.global_batch} evenly, so only ways with several to a clip "
            f"are shown; the nearest batch that they can share: --set global_batch={nearest}"
        )
    for way in ways:
        if gpus > 1:
            console.print(f"\n{way.how}{', the default' if way.default else ''}:")
        for line in describe(way.estimate):
            console.print(line)
        if gpus > 1:
            sent = way.sent
            console.print(
                f"sends        {sent.total / 1e9:.3g} GB per step from each: weights {sent.gathered / 1e9:.3g}, "
                f"gradients {(sent.scattered + sent.summed) / 1e9:.3g}, clips {sent.exchanged / 1e9:.3g}"
            )
        console.print(
            f"time         {duration(way.seconds_per_step)} per step, "
            f"{duration(way.seconds_per_step * config.steps)} in all, if {SHARE_OF_PEAK:.0%} of "
            f"{way.peak / 1e12:.3g} TFLOP/s are reached; without VAE and text encoder"
        )
        console.print(shortfall(way.estimate, device.memory) or "fits")
    if not any(way.fits for way in ways):
        least = min(ways, key=lambda way: way.estimate.total_memory)
        console.print(f"to make it fit, {advice(least.estimate, device.memory)}")
    if sampling:
        from stdit_train.estimate.sampling import describe_phases, plan_sampling

        for line in describe_phases(plan_sampling(config), device.memory):
            console.print(line)
