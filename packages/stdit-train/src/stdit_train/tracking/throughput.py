"""Speed and memory of training steps."""

import torch

from stdit_train.hardware import known_device


class Speed:
    """Computes samples and tokens per second and model FLOPs utilization (MFU) of steps of one shape.

    Args:
        samples: samples per step, over all devices.
        tokens: tokens per sample.
        flops: FLOPs of this device per step, forward and backward, without recomputation.
        precision: precision of the run.
        device: device of this process.
    """

    def __init__(self, samples: int, tokens: int, flops: int, precision: str, device: torch.device) -> None:
        self.samples, self.tokens, self.flops = samples, tokens, flops
        known = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = known.peak(precision) if known else None

    def figures(self, seconds: float, waited: float, memory: float) -> dict[str, float]:
        """Return the figures of a step: samples_per_second, tokens_per_second, data_wait (0..1), memory_gib, mfu.

        MFU is left out for devices with an unknown peak.

        Args:
            seconds: duration of the step, with waiting for data.
            waited: seconds of it spent waiting for data.
            memory: bytes in use.
        """
        rate = self.samples / seconds
        found = {
            "samples_per_second": rate,
            "tokens_per_second": rate * self.tokens,
            "data_wait": waited / seconds,
            "memory_gib": memory / 2**30,
        }
        if self.peak is not None:
            found["mfu"] = self.flops / seconds / self.peak
        return found
