"""Optimizers, the learning-rate schedule, and gradient clipping."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from stdit_model import STDiT
from stdit_train.config.schema import OptimizerConfig
from stdit_train.optim.muon import Muon


def build_optimizers(model: STDiT, config: OptimizerConfig) -> list[Optimizer]:
    """Build AdamW for all weights, or Muon (Jordan et al. 2024) for the hidden weight matrices and AdamW for the rest.

    Muon orthogonalises the update of a matrix, so biases, modulation tables, the patch embedding and the output stay
    with AdamW.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adamw":
        return [AdamW(trained.values(), **adamw)]
    hidden = set(hidden_matrices(model))
    matrices = [parameter for parameter in trained.values() if parameter in hidden]
    rest = [parameter for parameter in trained.values() if parameter not in hidden]
    muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay)
    return [muon, AdamW(rest, **adamw)] if rest else [muon]  # an adapter has matrices alone


def hidden_matrices(model: STDiT) -> Iterator[Tensor]:
    """Yield the matrices that Muon updates."""
    for part in (model.y_embedder, model.t_embedder, model.t_block, *model.blocks):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                yield module.weight


def learning_rate_factor(step: int, progress: float, config: OptimizerConfig) -> float:
    """Return the factor of the learning rates: linear warm-up over steps, linear decay over progress.

    Args:
        step: steps done.
        progress: share of the run that is done, 0..1.
        config: with `warmup` in steps and `decay` as the last share of the run.
    """
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0
    return warmup * max(decay, 0.0)


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set the learning rate of every group to its initial one times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor


def clip_gradients(model: nn.Module, maximum: float) -> Tensor:
    """Clip the global norm of the gradients in place and return the norm before, a scalar on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), maximum)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
