"""Counting the bytes that a process sends, to compare estimates with."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountTraffic(TorchDispatchMode):
    """Counts, while it is entered, the bytes that this process sends: `by_kind`, named as `Traffic`'s fields are."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, sent = _sent(func.name(), args)
        if sent:
            self.by_kind[kind] += sent
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """What an operation sends, and under which name it counts; 0 for what is no collective."""
    match name.partition(".")[0]:
        case "c10d::_allgather_base_":  # FSDP's
            return "gathered", args[0].nbytes - args[1].nbytes
        case "c10d::_reduce_scatter_base_":
            return "scattered", args[1].nbytes - args[0].nbytes
        case "c10d::allreduce_":
            size = torch.distributed.ProcessGroup.unbox(args[1]).size()
            return "summed", sum(2 * tensor.nbytes * (size - 1) // size for tensor in args[0])
        case "_c10d_functional::all_to_all_single":
            return "exchanged", args[0].nbytes * (len(args[1]) - 1) // len(args[1])
    return "", 0
