"""What the device can do at most: matrix products and copies."""

import torch
from benchmarks.gpu.setup import Case, Setup, Values

TITLE = "Peaks of the device"


def cases(setup: Setup) -> list[Case]:
    size, copied = (256, 2**20) if setup.tiny else (8192, 2**30)

    def matmul(dtype: torch.dtype, tf32: bool = False) -> Values:
        a, b = torch.randn(2, size, size, device=setup.device, dtype=dtype).unbind()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            seconds = setup.timed(lambda: a @ b)
        finally:
            torch.set_float32_matmul_precision(before)
        return {"size": f"{size} x {size} x {size}", "TFLOP/s": 2 * size**3 / seconds / 1e12}

    def copy(source: torch.device, pinned: bool = False) -> Values:
        tensor = torch.zeros(copied, dtype=torch.uint8, device=source)
        tensor = tensor.pin_memory() if pinned else tensor
        target = torch.empty(copied, dtype=torch.uint8, device=setup.device)
        seconds = setup.timed(lambda: target.copy_(tensor))
        moved = copied * (2 if source == setup.device else 1)  # on the device, read and written
        return {"size": f"{copied / 2**20:.0f} MiB", "GB/s": moved / seconds / 1e9}

    found = [
        Case("matmul, bf16", lambda: matmul(torch.bfloat16)),
        Case("matmul, fp32", lambda: matmul(torch.float32)),
        Case("matmul, TF32", lambda: matmul(torch.float32, tf32=True)),
        Case("copy on the device", lambda: copy(setup.device)),
    ]
    if setup.device.type == "cuda":
        found.append(Case("copy from pinned memory", lambda: copy(torch.device("cpu"), pinned=True)))
    return found
