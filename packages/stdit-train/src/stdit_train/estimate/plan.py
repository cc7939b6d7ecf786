"""What a stage takes on a number of devices: memory of each, and time from their stated peak rates."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stdit_train.config.load import ConfigError, did_you_mean
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.estimate.training import Estimate, estimate_run
from stdit_train.hardware import DEVICES, Device, measured_peak, this_device

if TYPE_CHECKING:
    from stdit_train.estimate.parallel import Traffic

NODE = 8  # devices that one machine usually has
SHARE_OF_PEAK = 0.4  # what a well-kept training run of this size reaches; the plan says that it is assumed


@dataclass(frozen=True)
class Plan:
    """One way to place a stage on devices."""

    how: str
    estimate: Estimate
    fits: bool
    peak: float  # FLOP/s of a device
    seconds_per_step: float  # at SHARE_OF_PEAK
    sent: "Traffic"  # bytes that a device sends in a step


def find_device_kind(name: str) -> Device:
    """A device by the name that the table has for it, or "cpu": this one, its peak measured.

    Raises:
        ConfigError: no such device.
    """
    if name == "cpu":
        here = this_device()
        rate = measured_peak()
        return Device("this CPU (its peak measured with a float32 matrix product)", here.memory, rate, rate)
    if name not in DEVICES:
        known = [*DEVICES, "cpu"]
        raise ConfigError(f"unknown device {name!r}: choose one of {', '.join(known)}{did_you_mean(name, known)}")
    return DEVICES[name]


def plan_stage(config: TrainConfig, device: Device, count: int) -> list[Plan]:
    """The ways to place a stage: alone; as copies, as shards, as copies of shards, and with clips that are shared.

    Args:
        config: of the stage; the VAE's and the text encoder's work is not in its FLOPs.
        device: of each process.
        count: of them.

    Raises:
        ConfigError: the devices don't divide the global batch, or have no stated peak.
    """
    from stdit_train.distributed.mesh import parallel_dims
    from stdit_train.estimate.parallel import traffic

    peak = device.peak(config.precision)
    if peak is None:
        raise ConfigError(f"no peak rate is known for {device.title}: name a device with --gpu")
    ways = {"alone": config}
    if count > 1:
        alone = replace(config, sequence=1)
        shared = max(2, config.sequence)
        ways = {"a copy on each": replace(alone, replicate=0), "sharded (FSDP2)": replace(alone, replicate=1)}
        if count > NODE and count % NODE == 0:
            ways["a sharded copy on each node (HSDP)"] = replace(alone, replicate=count // NODE)
        ways[f"sharded, {shared} to a clip"] = replace(config, replicate=1, sequence=shared)
    plans, refused = [], None
    for how, way in ways.items():
        try:
            grouping = parallel_dims(way, count)
        except ConfigError as error:
            refused = refused or error  # the first: what follows was not asked for
            continue
        estimate = estimate_run(way, device.memory, grouping)
        channels = estimate.latent[0]
        sent = traffic(
            model_arguments(way, channels, estimate.caption_channels),
            grouping,
            (estimate.micro_batch, *estimate.latent),
            itemsize=4 if way.precision == "fp32" else 2,
            checkpointing=way.activation_checkpointing is True,
        ).times(estimate.accumulation)
        seconds = estimate.step_flops / (count * peak * SHARE_OF_PEAK)
        plans.append(Plan(how, estimate, estimate.total_memory <= device.memory, peak, seconds, sent))
    if refused is not None and not plans:
        raise refused
    return plans
