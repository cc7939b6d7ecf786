"""What is put on a model from outside before it is trained: activation checkpointing."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from stdit_model import STDiT


def checkpoint_activations(model: STDiT) -> None:
    """Keep only each block's input for the backward and compute the rest anew (Chen et al. 2016)."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
