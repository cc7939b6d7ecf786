"""Plan a stage on a number of devices: the memory of each, and the time from their stated peak rates."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from stdit_train.components.sizes import check_clips
from stdit_train.config.resolve import model_words
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.distributed.dims import NODE, ParallelDims, default_replicas, parallel_dims
from stdit_train.errors import ConfigError
from stdit_train.estimate.devices import find_device_kind
from stdit_train.estimate.duration import duration
from stdit_train.estimate.fit import refusal
from stdit_train.estimate.parallel import Traffic, traffic
from stdit_train.estimate.phases import STEP
from stdit_train.estimate.training import Estimate, batch_words, estimate_run, parameter_words, to_dict
from stdit_train.hardware import GIB, Device, find_device, this_device

SHARE_OF_PEAK = 0.4  # assumed model FLOPs utilisation


@dataclass(frozen=True)
class Plan:
    """One way to place a stage on devices."""

    how: str
    estimate: Estimate
    fits: bool
    peak: float  # FLOP/s of a device
    seconds_per_step: float  # at SHARE_OF_PEAK
    sent: Traffic  # bytes that a device sends in a step
    default: bool  # whether `stdit train` takes this way

    def to_dict(self, device: Device) -> dict[str, Any]:
        """Return the numbers for JSON: bytes, FLOPs and seconds."""
        return {
            "how": self.how,
            "default": self.default,
            "device": device.title,
            **to_dict(self.estimate, device.memory),
            "peak_flops_per_second": self.peak,
            "share_of_peak": SHARE_OF_PEAK,
            "seconds_per_step": self.seconds_per_step,
            "sent_per_step": {**asdict(self.sent), "total": self.sent.total},
        }


def plan_stage(config: TrainConfig, device: Device, count: int) -> list[Plan]:
    """Return the ways to place a stage: on one device; as copies, shards, copies of shards, and with clips shared.

    Args:
        config: of the stage. The work of the VAE and the text encoder is not counted.
        device: of each process.
        count: number of devices.

    Raises:
        ConfigError: the devices don't divide the global batch, or have no stated peak; or the clips do not fill the
            VAE's latents.
    """
    peak = device.peak(config.precision)
    if peak is None:
        raise ConfigError(f"no peak rate is known for {device.title}: name a device with --gpu")
    check_clips(config)
    ways = {"alone": config}
    if count > 1 and (config.network == "vae" or config.partial):
        ways = {"a copy on each": config}
    elif count > 1:
        alone = replace(config, sequence=1)
        shared = max(2, config.sequence)
        ways = {"a copy on each": replace(alone, replicate=0), "sharded (FSDP2)": replace(alone, replicate=1)}
        if count > NODE and count % NODE == 0:
            ways["a sharded copy on each node (HSDP)"] = replace(alone, replicate=count // NODE)
        replicas = default_replicas(count, NODE)
        ways[f"sharded{' on each node' if replicas > 1 else ''}, {shared} to a clip"] = replace(
            config, replicate=replicas, sequence=shared
        )
    chosen = default_replicas(count, NODE) if config.replicate is None else config.replicate
    plans, refused = [], None
    for how, way in ways.items():
        try:
            dims = parallel_dims(way, count, NODE)
        except ConfigError as error:
            refused = refused or error  # the first: the later ways were not asked for
            continue
        estimate = estimate_run(way, device.memory, dims)
        sent = _sent(way, estimate, dims)
        seconds = estimate.step_flops / (count * peak * SHARE_OF_PEAK)
        fits = estimate.total_memory <= device.memory
        default = len(ways) == 1 or (way.replicate, way.sequence) == (chosen, config.sequence)
        plans.append(Plan(how, estimate, fits, peak, seconds, sent, default))
    if refused is not None and not plans:
        raise refused
    return plans


def _sent(config: TrainConfig, estimate: Estimate, dims: ParallelDims) -> Traffic:
    """Return the bytes that a process sends in a step."""
    if config.network == "vae":  # all gradients in float32, once
        return Traffic(0, 0, 8 * estimate.parameters * (dims.world_size - 1) // dims.world_size, 0)
    return traffic(
        model_arguments(config, estimate.latent[0], estimate.caption_channels),
        dims,
        (estimate.micro_batch, *estimate.latent),
        itemsize=4 if config.precision == "fp32" else 2,
        checkpointing=config.activation_checkpointing is True,
        trained=estimate.trained_parameters if config.partial else None,
    ).of_step(estimate.accumulation, config.reduce_once is not False)


@dataclass(frozen=True)
class DryRun:
    """What one stage would need on a machine.

    Attributes:
        estimate: parameters, FLOPs and memory on each process.
        device: of each process.
        seconds_per_step: at SHARE_OF_PEAK of the device's peak rate; None where no peak is known.
    """

    estimate: Estimate
    device: Device
    seconds_per_step: float | None

    @property
    def rows(self) -> dict[str, str]:
        """Return a table for people: name and value."""
        e, config = self.estimate, self.estimate.config
        c, t, h, w = e.latent
        memory = f"{e.total_memory / GIB:.2f} GiB at the peak, {e.peak_phase}; {self.device.memory / GIB:.1f} GiB free"
        main = f"{sum(e.host.values()) / GIB:.2f} GiB on each process"
        if e.processes > 1:
            main += f", {e.host_per_node / GIB:.1f} GiB on a node of {min(e.processes, NODE)}"
        batch = f"{batch_words(e)} per step: {e.accumulation} x {e.micro_batch} at once"
        if self.seconds_per_step is None:
            time = f"unknown: no peak rate of {self.device.title} (--gpu names another device)"
        else:
            time = (
                f"about {duration(self.seconds_per_step)} per step, {duration(self.seconds_per_step * config.steps)} "
                f"for {config.steps:,} steps, at {SHARE_OF_PEAK:.0%} of the peak rate; without VAE and text encoder"
            )
        return {
            "stage": config.stage,
            "clip": f"{config.data.frames}x{config.data.height}x{config.data.width} "
            f"(latents {c}x{t}x{h}x{w}, {e.tokens:,} tokens)",
            "model": model_words(config),
            "parameters": parameter_words(e),
            "batch": batch + (f", on {e.data_ranks} data-parallel ranks" if e.processes > 1 else ""),
            "FLOPs": f"{e.step_flops:.3g} per step, {e.step_flops * config.steps:.3g} in all",
            "device": f"{e.processes} x {self.device.title}",
            "memory": memory,
            f"  {STEP}": f"{e.step_memory / GIB:.2f} GiB",
            **{f"    {name}": f"{size / GIB:.2f} GiB" for name, size in e.memory.items()},
            **{f"  {name}": f"{size / GIB:.2f} GiB" for name, size in e.others.items()},
            "main memory": main,
            **{f"  {name}": f"{size / GIB:.2f} GiB" for name, size in e.host.items()},
            "time": time,
        }

    @property
    def notes(self) -> list[str]:
        """Return whether it fits and, if not, what to change, and the sizes that are assumed."""
        verdict = refusal(self.estimate, self.device.memory) or f"fits on {self.device.title}"
        return [verdict, *(f"assumed: {note}" for note in self.estimate.assumed)]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind the table, for JSON: bytes, FLOPs and seconds."""
        return {
            "device": self.device.title,
            **to_dict(self.estimate, self.device.memory),
            "seconds_per_step": self.seconds_per_step,
            "notes": self.notes,
        }


def dry_run(config: TrainConfig, processes: int = 1, device: str | None = None) -> DryRun:
    """Estimate what a stage needs.

    Args:
        config: of the stage.
        processes: that train together.
        device: see `find_device_kind`; this machine's GPU, or else its CPU, unless given.

    Raises:
        ConfigError: no such device, or processes that don't divide the global batch.
    """
    kind = find_device_kind(device) if device is not None else this_device()
    if device is None and find_device().type == "cpu":
        kind = find_device_kind("cpu")
    estimate = estimate_run(config, kind.memory, parallel_dims(config, processes))
    peak = kind.peak(config.precision)
    seconds = None if peak is None else estimate.step_flops / (processes * peak * SHARE_OF_PEAK)
    return DryRun(estimate, kind, seconds)
