"""Bytes that a process holds at the peak of a step, when its model is sharded and its clips are shared."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stdit_model import STDiT, flops
from stdit_model.blocks import mixings
from stdit_train.distributed.mesh import ParallelDims


def memory(
    arguments: Mapping[str, Any],
    grouping: ParallelDims,
    shape: tuple[int, int, int, int, int],
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> dict[str, int]:
    """What takes how much: AdamW, the average in float32, `stdit_train.distributed.parallelize.build_sharded_model`.

    Args:
        arguments: of STDiT's constructor, or a `model.config`.
        grouping: of the processes.
        shape: of a micro-batch's latents [B, C, T, H, W].
        itemsize: bytes of a gathered weight and of an activation.
        checkpointing: only the blocks' inputs are kept for the backward.
    """
    arguments = STDiT.arguments(arguments)
    parts = _parameter_shapes(arguments)
    held = sum(-(-size[0] // grouping.shard) * math.prod(size[1:]) for name, size in parts.items())
    sizes = {name: math.prod(size) for name, size in parts.items()}
    texts = sum(size for name, size in sizes.items() if ".kv_linear." in name)
    blocks = [
        sum(size for name, size in sizes.items() if name.startswith(f"blocks.{i}.") and ".kv_linear." not in name)
        for i in range(arguments["depth"])
    ]
    ends = sum(sizes.values()) - sum(blocks) - texts
    batch, channels, frames, height, width = shape
    patch = arguments["patch_size"][0]
    own = patch * -(-(frames // patch) // grouping.sequence)
    kept = flops.activation_bytes(arguments, (batch, channels, own, height, width), None, itemsize, checkpointing)
    return {
        "weights": 4 * held,
        "gradients": 4 * held,
        "optimizer": 8 * held,
        "average": 4 * held,
        # two blocks, one computed and one on its way; the largest block's gradients before they are scattered
        "gathered": itemsize * (ends + texts + 2 * max(blocks)) + (itemsize + 4) * max(blocks),
        "activations": kept,
    }


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends for the forward and backward of one micro-batch."""

    gathered: int  # weights
    scattered: int  # gradients, summed among the shards of a copy
    summed: int  # gradients, among the copies
    exchanged: int  # activations and predictions, among the processes of a clip

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def times(self, count: int) -> "Traffic":
        """Of so many micro-batches."""
        return Traffic(*(count * getattr(self, field.name) for field in fields(self)))


def traffic(
    arguments: Mapping[str, Any],
    grouping: ParallelDims,
    shape: tuple[int, int, int, int, int],
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> Traffic:
    """What `stdit_train.distributed.parallelize` makes a process send.

    Args:
        arguments: of STDiT's constructor, or a `model.config`.
        grouping: of the processes.
        shape: of a micro-batch's latents [B, C, T, H, W].
        itemsize: bytes of a gathered weight and of an activation; gradients are summed in float32.
        checkpointing: each block's forward is done, and its exchanges too, once more in the backward.
    """
    arguments = STDiT.arguments(arguments)
    parts = _parameter_shapes(arguments)
    padded = {name: -(-size[0] // grouping.shard) * math.prod(size[1:]) for name, size in parts.items()}  # of a shard
    everything = sum(padded.values())
    resharded = sum(count for name, count in padded.items() if name.startswith("blocks."))  # given up in between
    others = grouping.shard - 1
    passes = 3 if checkpointing else 2
    return Traffic(
        gathered=others * itemsize * (everything + resharded),
        scattered=others * 4 * everything,
        summed=2 * 4 * everything * (grouping.replicate - 1) // grouping.replicate,
        exchanged=_exchanged(arguments, grouping.sequence, shape, itemsize, passes),
    )


def _exchanged(
    arguments: Mapping[str, Any], sequence: int, shape: tuple[int, int, int, int, int], itemsize: int, passes: int
) -> int:
    batch, channels, frames, height, width = shape
    patch_t, patch_h, patch_w = arguments["patch_size"]
    tokens = (height // patch_h) * (width // patch_w)
    own = -(-(frames // patch_t) // sequence)  # frames of tokens
    kinds = Counter(mixings(arguments["variant"], arguments["depth"]))
    token = arguments["hidden_size"] * itemsize
    by_position = 2 * own * sequence * -(-tokens // sequence) * token  # there and back, positions padded
    by_heads = 4 * own * tokens * token  # queries, keys and values there, the output back
    over_time = kinds["sequential"] + kinds["parallel"] + kinds["temporal"]
    exchanged = passes * batch * (over_time * by_position + kinds["full"] * by_heads)
    out = channels * (2 if arguments["learn_sigma"] else 1)
    prediction = batch * out * own * sequence * patch_t * height * width * itemsize
    return (exchanged + 2 * prediction) * (sequence - 1) // sequence


def _parameter_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of STDiT's parameters by name: the null caption is a buffer, and left out."""
    shapes = STDiT.parameter_shapes(**arguments)
    return {name: shape for name, shape in shapes.items() if name != "y_embedder.y_embedding"}


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
