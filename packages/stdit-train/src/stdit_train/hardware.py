"""Find the device of this machine, its memory and peak rate; what other devices have, as their makers state it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        title: its name for people.
        memory: bytes that a process can have.
        half: FLOP/s of dense matrix products in bfloat16 or float16, accumulated in float32; None where not stated.
        single: FLOP/s in float32, without TF32; None where not stated.
    """

    title: str
    memory: int
    half: float | None
    single: float | None

    def peak(self, precision: str) -> float | None:
        """Return the FLOP/s in the precision of a run."""
        return self.single if precision == "fp32" else self.half


# Sources: NVIDIA's data sheets of H200, H100 and A100 (SXM), and of the GeForce RTX 4090 (Ada whitepaper, appendix A).
# Memory as the driver shows it, less what a CUDA context takes.
DEVICES = {
    "h200": Device("NVIDIA H200", int(139.0 * GIB), 989e12, 67e12),
    "h100": Device("NVIDIA H100 (SXM, 80 GB)", int(78.5 * GIB), 989e12, 67e12),
    "a100": Device("NVIDIA A100 (80 GB)", int(78.5 * GIB), 312e12, 19.5e12),
    "4090": Device("NVIDIA GeForce RTX 4090", int(23.0 * GIB), 165e12, 82.6e12),
}


def find_device() -> torch.device:
    """Return CUDA if there is a GPU, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_cpu() -> str:
    """Return the number of cores and of torch's threads in words: CPU, 8 cores, 1 thread."""
    import torch

    counts = {"core": os.cpu_count() or 1, "thread": torch.get_num_threads()}
    return ", ".join(["CPU", *(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())])


def this_device() -> Device:
    """Return this machine's GPU or, without one, its CPU: with its free memory, and no peak rate if none is stated."""
    import torch

    if not torch.cuda.is_available():
        return Device("this CPU", available_memory(), None, None)
    name = torch.cuda.get_device_name()
    known = known_device(name)
    half, single = (known.half, known.single) if known else (None, None)
    return Device(name, available_memory(), half, single)


def known_device(name: str) -> Device | None:
    """Return the device that torch calls by a name, None if it is not in `DEVICES` (PCIe cards are slower)."""
    words = name.lower().replace("-", " ").split()
    if "pcie" in words or "nvl" in words:
        return None
    return next((device for key, device in DEVICES.items() if key in words), None)


def available_memory() -> int:
    """Return the bytes that are free on the GPU, or in main memory where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use: the most that torch has allocated on a GPU so far, or this process's resident set."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def measured_peak(seconds: float = 0.3) -> float:
    """Measure the FLOP/s of float32 matrix products on this CPU, with all threads that torch uses.

    The best product that fits into a time is taken, on one thread and by that thread's own time, and multiplied by the
    number of threads: what else the machine does meanwhile does not count.
    """

    import torch

    size, best, threads = 512, float("inf"), torch.get_num_threads()
    a, b = torch.randn(2, size, size).unbind()
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            started = time.thread_time()
            a @ b
            best = min(best, time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return threads * 2 * size**3 / best


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to 2 GiB, to use it again; where the C library is glibc.

    On a CPU each activation of more than a few MiB is else mapped anew: the system clears it page by page, which takes
    a tenth of a training step.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, GIB)
        mallopt(trim_threshold, 2 * GIB - 1)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; this process does not wait for a copy to a GPU, which is made from pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
