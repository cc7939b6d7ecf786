"""What a stage takes on a number of devices: memory of each, and time from their stated peak rates."""

from dataclasses import dataclass

from stdit_train.config import ConfigError, TrainConfig, like
from stdit_train.estimate import Estimate, estimate_run
from stdit_train.hardware import DEVICES, Device, measured_peak, this_device

SHARE_OF_PEAK = 0.4  # what a well-kept training run of this size reaches; the plan says that it is assumed


@dataclass(frozen=True)
class Plan:
    """One way to place a stage on devices."""

    how: str
    estimate: Estimate
    fits: bool
    peak: float  # FLOP/s of a device
    seconds_per_step: float  # at SHARE_OF_PEAK


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
        raise ConfigError(f"unknown device {name!r}: choose one of {', '.join(known)}{like(name, known)}")
    return DEVICES[name]


def plan_stage(config: TrainConfig, device: Device, count: int) -> list[Plan]:
    """The ways to place a stage: alone, or as copies and as shards.

    Args:
        config: of the stage; the VAE's and the text encoder's work is not in its FLOPs.
        device: of each process.
        count: of them.

    Raises:
        ConfigError: the devices don't divide the global batch, or have no stated peak.
    """
    peak = device.peak(config.precision)
    if peak is None:
        raise ConfigError(f"no peak rate is known for {device.title}: name a device with --gpu")
    ways = {"alone": False} if count == 1 else {"a copy on each": False, "sharded (FSDP2)": True}
    plans = []
    for how, sharded in ways.items():
        estimate = estimate_run(config, device.memory, count, sharded)
        seconds = estimate.step_flops / (count * peak * SHARE_OF_PEAK)
        plans.append(Plan(how, estimate, estimate.total_memory <= device.memory, peak, seconds))
    return plans
