"""Find the module that first produced a NaN or an infinity, by running a micro-batch again with hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def find_nonfinite(module: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], Tensor]) -> str | None:
    """Name the first tensor of a forward and backward that is not finite, None if all are.

    Weights are checked first, then the inputs, then outputs in forward order, then gradients in backward order. The
    gradients of the module are cleared.

    Args:
        module: network.
        inputs: its inputs, by the name to report.
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
    # Hooks of submodules run first, so a module is named only for its own arithmetic between them.
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
