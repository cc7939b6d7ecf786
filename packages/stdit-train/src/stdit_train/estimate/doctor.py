"""Report on this machine: device, memory, compiler, versions, disk and hub; and the stages that fit."""

import platform
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

from stdit_train.config.schema import TrainConfig
from stdit_train.estimate.training import Estimate, estimate_run
from stdit_train.hardware import GIB, available_memory, describe_cpu, find_device
from stdit_train.versions import package_versions


def examine(folder: Path) -> dict[str, str]:
    """Return facts about this machine by name, for people. The hub is asked, for five seconds at most.

    Args:
        folder: a folder on the disk of the runs.
    """
    device = find_device()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device": _device(device),
        "memory": f"{available_memory() / GIB:.1f} GiB free",
        "bfloat16": _bfloat16(device),
        "compile": _compiles(device),
        "versions": ", ".join(f"{name} {found}" for name, found in package_versions().items() if name != "python"),
        "disk": f"{shutil.disk_usage(folder).free / GIB:.1f} GiB free in {folder.resolve()}",
        "hub": _hub(),
    }


def estimate_stages(configs: Iterable[TrainConfig]) -> tuple[list[Estimate], int]:
    """Estimate stages on this machine, as the check before a run does; return them and the bytes that are free."""
    available = available_memory()
    return [estimate_run(config, available) for config in configs], available


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]} (CUDA {torch.version.cuda})"
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"{describe_cpu()} for torch; no GPU that torch can use"


def _bfloat16(device: torch.device) -> str:
    if device.type == "cuda":
        return "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no: --set precision=fp32"
    if device.type == "mps":
        return "untried: --set precision=fp32 is safe"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return "yes, in hardware" if fast else "yes, but this CPU emulates it: --set precision=fp32 is faster"


def _compiles(device: torch.device) -> str:
    """Return whether torch.compile has what it needs: Triton on a GPU, otherwise a C++ compiler."""
    if device.type == "cuda":
        return "yes" if find_spec("triton") else "no: Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return f"yes, with {get_cpp_compiler()}"
    except Exception as error:  # torch raises errors of its own and of the search
        return f"no: {str(error).strip().splitlines()[0] or type(error).__name__}"


def _hub() -> str:
    from huggingface_hub import constants

    from stdit_model.weights.hub import unreachable

    down = unreachable()
    return f"{constants.ENDPOINT} answers" if down is None else f"not used: {down}; give folders instead of Hub ids"
