"""What all parts share: the device, the sizes that are measured, a clock, and the search for the largest batch."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stdit_model import STDiT
from stdit_model.diffusion import add_noise, iddpm_loss
from stdit_model.presets import preset

TEXT_TOKENS = 120
SECONDS = 2.0  # to repeat what is timed for
Values = dict[str, Any]

# Frames, height and width of the latents of Open-Sora 1.0's stages; the second ones are for trying the benchmark out.
LATENTS = {"16x256": (16, 32, 32), "16x512": (16, 64, 64), "64x512": (64, 64, 64)}
TINY_LATENTS = {"16x256": (2, 4, 4), "16x512": (2, 8, 8), "64x512": (4, 8, 8)}
TINY = {"depth": 2, "hidden_size": 48, "num_heads": 4}


@dataclass(frozen=True)
class Case:
    """One row of a part's table.

    Attributes:
        name: of the row.
        run: measures it, and returns values by column.
        rank: cases of lower ranks go first, those of all parts before the next rank.
        compiled: whether it compiles anything.
    """

    name: str
    run: Callable[[], Values]
    rank: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Setup:
    """Where and at what size is measured.

    Attributes:
        device: of the models.
        tiny: small sizes, to try the benchmark out.
        results: of the cases that are done, by part and case.
    """

    device: torch.device
    tiny: bool
    results: dict[tuple[str, str], Values] = field(default_factory=dict)

    @property
    def latents(self) -> dict[str, tuple[int, int, int]]:
        return TINY_LATENTS if self.tiny else LATENTS

    def arguments(self, variant: str = "seq", **changes: Any) -> dict[str, Any]:
        """Return the constructor arguments of XL/2, or of a tiny model."""
        return {**(TINY if self.tiny else preset("XL/2")), "variant": variant, **changes}

    def model(self, variant: str = "seq", **changes: Any) -> STDiT:
        """Make the model on the device, float32, its zero weights random, so that no kernel has it easy."""
        torch.manual_seed(0)
        with self.device:
            model = STDiT(**self.arguments(variant, **changes))
        fill(model)
        return model

    def shape(self, size: str, batch: int) -> tuple[int, ...]:
        """Return the shape of latents, [B, C, T, H, W]."""
        return (batch, 4, *self.latents[size])

    def inputs(self, shape: tuple[int, ...], channels: int = 4096) -> tuple[Tensor, ...]:
        """Draw latents, noise, timesteps, text and its mask, which has captions of 20 tokens and more."""
        batch, like = shape[0], {"device": self.device}
        text = 12 if self.tiny else TEXT_TOKENS
        length = torch.randint(text // 6, text + 1, (batch, 1), **like)
        return (
            torch.randn(shape, **like),
            torch.randn(shape, **like),
            torch.randint(0, 1000, (batch,), **like),
            torch.randn(batch, text, channels, **like),
            torch.arange(text, **like)[None] < length,
        )

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], Any], warm_up: int = 2) -> float:
        """Return the seconds of a call: the median of three calls and more, after some to warm up; of one for tiny."""
        for _ in range(1 if self.tiny else warm_up):
            run()
        self.wait()
        times: list[float] = []
        while not times or (not self.tiny and (len(times) < 3 or (sum(times) < SECONDS and len(times) < 100))):
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def forget_peak(self) -> None:
        """Free what is not in use, and begin to record the peak of memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the largest memory since `forget_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

    def peak_flops(self) -> float | None:
        """Return FLOP/s that a utilisation is a share of: the maker's, else the measured ones of a matrix product."""
        if self.device.type == "cuda":
            from stdit_train.hardware import known_device

            known = known_device(torch.cuda.get_device_name())
            if known is not None:
                return known.half
        measured = self.results.get(("peaks", "matmul, bf16"), {}).get("TFLOP/s")
        return None if measured is None else measured * 1e12

    def utilisation(self, flops: float, seconds: float) -> Values:
        """Return TFLOP/s and the share of the peak (MFU; recomputed activations do not count as work)."""
        peak = self.peak_flops()
        return {"TFLOP/s": flops / seconds / 1e12, "MFU": None if peak is None else flops / seconds / peak}

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision."""
        return torch.autocast(self.device.type, torch.bfloat16)


def fill(model: torch.nn.Module) -> None:
    """Draw all weights that are zero, biases aside."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)


class TrainStep:
    """A training step of iDDPM: forward and backward under autocast to bfloat16, and AdamW."""

    def __init__(self, setup: Setup, model: STDiT) -> None:
        self.setup, self.model = setup, model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def __call__(self, inputs: tuple[Tensor, ...]) -> None:
        x0, noise, t, y, mask = inputs
        with self.setup.autocast():
            loss = iddpm_loss(self.model(add_noise(x0, noise, t), t, y, mask), x0, noise, t)["loss"].mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fits(self, size: str, batch: int) -> bool:
        """Whether a step of so many samples fits into memory."""
        try:
            self(self.setup.inputs(self.setup.shape(size, batch)))
            self.setup.wait()
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        self.optimizer.zero_grad(set_to_none=True)
        self.setup.forget_peak()
        return fits


def largest(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """Return the largest number that fits, 0 for none: exact to an eighth, and below 16.

    Args:
        fits: whether a number fits; all below one that fits do, too.
        guess: to begin with.
        limit: largest number to try.
    """
    low, high, number = 0, limit + 1, min(max(guess, 1), limit)
    while high - low > max(1, low // 8):
        if fits(number):
            low = number
            number = min(high - 1, low + max(1, low // 2)) if high > limit else (low + high) // 2
        else:
            high = number
            number = max(1, high * 3 // 4) if low == 0 else (low + high) // 2
    return low
