"""A CUDA device that this machine need not have: tensors on it have no contents, those on the CPU are real."""

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operators that wait for the device, because their result's shape or value is needed on the host.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.linalg_eigh, aten.equal}
NO_KERNEL = {aten._unsafe_view, aten._reshape_alias, aten.empty, aten.empty_like, aten.new_empty, torch.ops.prim.device}


class FakeCuda(TorchDispatchMode):
    """Runs operators on CUDA tensors by their shapes alone, so that a tensor on the wrong device is an error.

    Attributes:
        waits: what makes the host wait for the device, with how often: copies between the two, and values read.
        kernels: operators that launch a kernel, with how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        # Below this mode, so that it sees what is left to it; torch then does not look for a driver either.
        self._fake: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "FakeCuda":
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        sources = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
        places = sources + [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        packet = func.overloadpacket
        if not any(place.type == "cuda" for place in places):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if packet in (aten._to_copy, aten.copy_) and len({place.type for place in places}) > 1:
            from_host = sources[-1].type == "cpu"
            self.waits["copy to the device" if from_host else "copy to the host"] += 1
        elif packet in WAITING:
            self.waits[str(packet)] += 1
        elif launches(func):
            self.kernels[str(packet).removeprefix("aten.")] += 1
        return func(*args, **kwargs)


class Kernels(TorchDispatchMode):
    """Counts operators on any device that launch kernels: on "meta" in a backward, which a fake device cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if launches(func):
            self.kernels[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def launches(func: Any) -> bool:
    """Return whether an operator launches a kernel."""
    return not func.is_view and func.overloadpacket not in NO_KERNEL
