"""How fast a run goes and what it takes: the figures of a progress line."""

import torch

from stdit_train.hardware import known_device, memory_in_use


class Speed:
    """Rates of a run's steps.

    Args:
        samples: a step.
        tokens: a sample.
        flops: this device's of a step, forward and backward, without recomputation (the "model FLOPs" of MFU).
        precision: of the run.
        device: where it runs.
    """

    def __init__(self, samples: int, tokens: int, flops: int, precision: str, device: torch.device) -> None:
        self.samples, self.tokens, self.flops, self.device = samples, tokens, flops, device
        known = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = known.peak(precision) if known else None

    def figures(self, seconds: float, waited: float) -> dict[str, float]:
        """Of one step.

        Args:
            seconds: it took, waiting included.
            waited: seconds of these for data.
        """
        rate = self.samples / seconds
        found = {
            "samples_per_second": rate,
            "tokens_per_second": rate * self.tokens,
            "data_wait": waited / seconds,
            "memory_gib": memory_in_use(self.device) / 2**30,
        }
        if self.peak is not None:
            found["mfu"] = self.flops / seconds / self.peak
        return found
