"""Which module was the first to produce a NaN or an infinity: a micro-batch is run once more and watched."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def find_nonfinite(module: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], Tensor]) -> str | None:
    """Name what first went wrong in a forward and backward, None if all stays finite this time.

    Weights come first, then what the micro-batch holds, then forward order, then backward order. Gradients of the
    module are cleared.

    Args:
        module: the network.
        inputs: what it is given, by name.
        run: computes the loss, a scalar.
    """
    for name, parameter in module.named_parameters():
        if not _finite(parameter):
            return f"the weight {name}"
    for name, tensor in inputs.items():
        if not _finite(tensor):
            return name
    found: list[str] = []
    with torch.enable_grad():
        handles = list(_watch(module, found))
        try:
            loss = run()
            if not found and not _finite(loss):
                found.append("the loss itself, from finite outputs")
            if not found:
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    if not found:
        broken = (name for name, p in module.named_parameters() if p.grad is not None and not _finite(p.grad))
        found += [f"the gradient of {name}" for name in broken]
    module.zero_grad(set_to_none=True)
    return found[0] if found else None


def _watch(module: nn.Module, found: list[str]) -> Iterator[Any]:
    # A module's parts answer before it, so it is named only for its own arithmetic between them.
    for name, part in module.named_modules():
        if name:
            yield part.register_forward_hook(_forward_hook(f"{name} ({type(part).__name__})", found))


def _forward_hook(name: str, found: list[str]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not found and not _finite(tensor):
                found.append(f"the output of {name}")
            if tensor.requires_grad:
                tensor.register_hook(_gradient_hook(name, found))

    return hook


def _gradient_hook(name: str, found: list[str]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not found and not _finite(gradient):
            found.append(f"the gradient at the output of {name}")

    return hook


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, tuple | list) else []


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
