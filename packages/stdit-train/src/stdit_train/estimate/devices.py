"""The devices that a run is planned for, by name."""

import re

from stdit_train.config.keys import did_you_mean
from stdit_train.errors import ConfigError
from stdit_train.hardware import DEVICES, GIB, Device, measured_peak, this_device

CONTEXT = GIB  # of a card's memory that the driver and a CUDA context take
_CARD = re.compile(r"(\d+(?:\.\d+)?) ?gi?b? ?, ?(\d+(?:\.\d+)?) ?t(?:flops?|flop/s)?", re.IGNORECASE)


def find_device_kind(name: str) -> Device:
    """Return the device of a name.

    Args:
        name: one in `stdit_train.hardware.DEVICES`; "cpu" for this machine's, its peak measured; or the memory and the
            rate of any card, as "24GB,80TFLOPS". The memory is the one on the box, of which the driver takes about
            1 GiB; the rate is that of dense matrix products in the precision of the run.

    Raises:
        ConfigError: no such device.
    """
    if name == "cpu":
        here = this_device()
        rate = measured_peak()
        return Device("this CPU (its peak measured with a float32 matrix product)", here.memory, rate, rate)
    if card := _CARD.fullmatch(name.strip()):
        memory, rate = float(card[1]), 1e12 * float(card[2])
        if memory * GIB <= CONTEXT or not rate:
            raise ConfigError(f"--gpu {name}: a card needs more than 1 GB and a rate above 0")
        return Device(
            f"a card of {memory:g} GB and {float(card[2]):g} TFLOP/s", int(memory * GIB) - CONTEXT, rate, rate
        )
    if name not in DEVICES:
        known = [*DEVICES, "cpu"]
        raise ConfigError(
            f"unknown device {name!r}: choose one of {', '.join(known)}{did_you_mean(name, known)}, or give the memory "
            "and the rate of a card, e.g. 24GB,80TFLOPS"
        )
    return DEVICES[name]
