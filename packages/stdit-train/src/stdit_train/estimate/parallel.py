"""Estimate what each of several processes holds and sends: sharded weights, clips shared by sequence parallelism."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from stdit_model import STDiT, flops
from stdit_model.blocks import mixings
from stdit_train.distributed.dims import ParallelDims


def sharded_memory(
    arguments: Mapping[str, Any],
    dims: ParallelDims,
    shape: tuple[int, int, int, int, int],
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
    unreduced: bool = False,
) -> dict[str, int]:
    """Return the bytes that a process holds at the peak of a step, with AdamW and the EMA in float32.

    The weights are sharded as in `stdit_train.distributed.parallelize.build_sharded_model`.

    Args:
        arguments: of STDiT's constructor, or a `model.config`.
        dims: how the processes share the run.
        shape: of a micro-batch's latents [B, C, T, H, W].
        itemsize: bytes of a gathered weight and of an activation.
        checkpointing: whether only the blocks' inputs are kept for the backward pass.
        unreduced: whether gradients of several micro-batches are added up before they are summed over the processes.
    """
    arguments = STDiT.arguments(arguments)
    parts = parameter_shapes(arguments)
    held = sum(-(-size[0] // dims.shard) * math.prod(size[1:]) for name, size in parts.items())
    total = sum(map(math.prod, parts.values()))
    block = _gathered_together(parts, arguments["depth"]).block
    batch, channels, frames, height, width = shape
    patch = arguments["patch_size"][0]
    own = patch * -(-(frames // patch) // dims.sequence)
    kept = flops.activation_bytes(arguments, (batch, channels, own, height, width), None, itemsize, checkpointing)
    # A block's gradients, before and while they are scattered, take the place of its activations.
    freed = 0 if checkpointing else kept // arguments["depth"]
    return {
        "weights": 4 * held,
        "gradients": 4 * (total if unreduced else held),  # a shard is made as its whole is freed
        "optimizer": 8 * held,
        "average": 4 * held,
        "gathered": gathered_bytes(arguments, itemsize) + max(0, (itemsize + 4) * block - freed),
        "activations": kept,
    }


def gathered_bytes(arguments: Mapping[str, Any], itemsize: int = 2) -> int:
    """Return the bytes of whole weights that a process holds at once in a forward, as FSDP2 gathers them.

    Args:
        arguments: of STDiT's constructor, or a `model.config`.
        itemsize: bytes of a gathered weight.
    """
    arguments = STDiT.arguments(arguments)
    together = _gathered_together(parameter_shapes(arguments), arguments["depth"])
    return itemsize * (together.ends + 2 * together.block)  # two blocks, one computed and one being gathered


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends for the forward and backward of one micro-batch."""

    gathered: int  # weights
    scattered: int  # gradients, summed among the shards of a copy
    summed: int  # gradients, among the copies
    exchanged: int  # activations and predictions, among the processes of a clip

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def of_step(self, micro_batches: int, reduce_once: bool = True) -> "Traffic":
        """Return the bytes of a step.

        Args:
            micro_batches: of the step.
            reduce_once: whether gradients are summed among the shards once; among the replicas they always are.
        """
        return Traffic(
            gathered=micro_batches * self.gathered,
            scattered=self.scattered if reduce_once else micro_batches * self.scattered,
            summed=self.summed,
            exchanged=micro_batches * self.exchanged,
        )


def traffic(
    arguments: Mapping[str, Any],
    dims: ParallelDims,
    shape: tuple[int, int, int, int, int],
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
    trained: int | None = None,
) -> Traffic:
    """Return the bytes that a process sends, as `stdit_train.distributed.parallelize` shares the work.

    Args:
        arguments: of STDiT's constructor, or a `model.config`.
        dims: how the processes share the run.
        shape: of a micro-batch's latents [B, C, T, H, W].
        itemsize: bytes of a gathered weight and of an activation; gradients are summed in float32.
        checkpointing: whether each block's forward pass, with its exchanges, is repeated in the backward pass.
        trained: number of parameters that are trained, where the others are frozen on every process.
    """
    if trained is not None:
        return Traffic(0, 0, 2 * 4 * trained * (dims.replicate - 1) // dims.replicate, 0)
    arguments = STDiT.arguments(arguments)
    parts = parameter_shapes(arguments)
    padded = {name: -(-size[0] // dims.shard) * math.prod(size[1:]) for name, size in parts.items()}  # of a shard
    everything = sum(padded.values())
    resharded = sum(count for name, count in padded.items() if name.startswith("blocks."))  # freed in between
    others = dims.shard - 1
    passes = 3 if checkpointing else 2
    return Traffic(
        gathered=others * itemsize * (everything + resharded),
        scattered=others * 4 * everything,
        summed=2 * 4 * everything * (dims.replicate - 1) // dims.replicate,
        exchanged=_exchanged(arguments, dims.sequence, shape, itemsize, passes),
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
    by_position = 2 * own * sequence * -(-tokens // sequence) * token  # both ways, positions padded
    by_heads = 4 * own * tokens * token  # queries, keys and values, then the output
    over_time = kinds["sequential"] + kinds["parallel"] + kinds["temporal"]
    exchanged = passes * batch * (over_time * by_position + kinds["full"] * by_heads)
    out = channels * (2 if arguments["learn_sigma"] else 1)
    prediction = batch * out * own * sequence * patch_t * height * width * itemsize
    return (exchanged + 2 * prediction) * (sequence - 1) // sequence


class _Together(NamedTuple):
    """Numbers of parameters that are gathered together: of the largest block, and outside the blocks."""

    block: int
    ends: int


def _gathered_together(parts: Mapping[str, tuple[int, ...]], depth: int) -> _Together:
    sizes = {name: math.prod(size) for name, size in parts.items()}
    blocks = [sum(size for name, size in sizes.items() if name.startswith(f"blocks.{i}.")) for i in range(depth)]
    return _Together(max(blocks), sum(sizes.values()) - sum(blocks))


def parameter_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of STDiT's parameters by name; the null caption is a buffer, and left out.

    Args:
        arguments: all of STDiT's constructor.
    """
    shapes = STDiT.parameter_shapes(**arguments)
    return {name: shape for name, shape in shapes.items() if name != "y_embedder.y_embedding"}
