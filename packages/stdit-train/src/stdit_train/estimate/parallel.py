"""Bytes that a process holds at the peak of a step, when its model is sharded and its clips are shared."""

import math
from collections.abc import Mapping
from typing import Any

from stdit_model import flops
from stdit_model.weights.strict import shapes
from stdit_train.distributed.mesh import Grouping


def memory(
    arguments: Mapping[str, Any],
    grouping: Grouping,
    shape: tuple[int, int, int, int, int],
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> dict[str, int]:
    """What takes how much: AdamW, the average in float32, `stdit_train.distributed.parallelize.parallel_model`.

    Args:
        arguments: all of STDiT's (`model.config`).
        grouping: of the processes.
        shape: of a micro-batch's latents [B, C, T, H, W].
        itemsize: bytes of a gathered weight and of an activation.
        checkpointing: only the blocks' inputs are kept for the backward.
    """
    known = {name: value for name, value in arguments.items() if not name.startswith("_")}
    parts = {name: size for name, size in shapes(known).items() if name != "y_embedder.y_embedding"}
    held = sum(-(-size[0] // grouping.shard) * math.prod(size[1:]) for name, size in parts.items())
    sizes = {name: math.prod(size) for name, size in parts.items()}
    texts = sum(size for name, size in sizes.items() if ".kv_linear." in name)
    blocks = [
        sum(size for name, size in sizes.items() if name.startswith(f"blocks.{i}.") and ".kv_linear." not in name)
        for i in range(known["depth"])
    ]
    ends = sum(sizes.values()) - sum(blocks) - texts
    batch, channels, frames, height, width = shape
    patch = known["patch_size"][0]
    own = patch * -(-(frames // patch) // grouping.sequence)
    kept = flops.activation_bytes(known, (batch, channels, own, height, width), None, itemsize, checkpointing)
    return {
        "weights": 4 * held,
        "gradients": 4 * held,
        "optimizer": 8 * held,
        "average": 4 * held,
        # two blocks, one computed and one on its way; the largest block's gradients before they are scattered
        "gathered": itemsize * (ends + texts + 2 * max(blocks)) + (itemsize + 4) * max(blocks),
        "activations": kept,
    }
