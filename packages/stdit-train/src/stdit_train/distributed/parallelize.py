"""Build the transformer of a run on one process or many, with everything that is put on it from outside, in order.

Sequence parallelism changes what an attention computes, so it comes first; then activation checkpointing; then
compilation, block by block; then sharding (FSDP2), whose hooks surround each block.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stdit_model import STDiT
from stdit_train.config.schema import Checkpointing, TrainConfig, model_arguments
from stdit_train.distributed.mesh import ParallelMesh
from stdit_train.distributed.sequence_parallel import share_clips
from stdit_train.distributed.sharded_weights import copy_shards, full_state_dict, init_weights, load_full_state_dict
from stdit_train.distributed.world import World

log = logging.getLogger(__name__)

GRAPHS = 8  # most graphs for each shape; two kinds of blocks, the first with its positions, make two to four
_aten = torch.ops.aten

# Results that selective checkpointing keeps: expensive to compute, and no larger than their inputs.
KEPT = {
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
}


def build_model(config: TrainConfig, latent_channels: int, caption_channels: int, world: World | None = None) -> STDiT:
    """Build the transformer of a run, with float32 weights initialised from its seed.

    On a world with a mesh it is sharded, with activation checkpointing and compilation applied, and its weights equal
    those of one process to the bit; they are gathered in bfloat16 unless the precision is fp32.

    Args:
        config: the run's settings.
        latent_channels: channels of the VAE's latents.
        caption_channels: width of the text encoder.
        world: processes to build it on. [default: this one, on the CPU]
    """
    arguments = model_arguments(config, latent_channels, caption_channels)
    if world is None or world.mesh is None:
        torch.manual_seed(config.seed)
        model = STDiT(**arguments)
        return model if world is None else cast(STDiT, model.to(world.device()))
    model = build_sharded_model(
        arguments,
        world.mesh,
        world.device(),
        dtype=None if config.precision == "fp32" else torch.bfloat16,
        checkpointing=config.activation_checkpointing,
        compiled=config.compile,
        shapes=clip_shapes(config),
    )
    load_full_state_dict(model, init_weights(arguments, config.seed))
    return model


def clip_shapes(config: TrainConfig) -> int:
    """Return the number of shapes that the clips of a run have; micro-batches of one shape have one size."""
    return max(1, len(config.data.buckets))


def build_ema(model: STDiT, world: World) -> STDiT:
    """Return a float32 copy of a model, for the average of its weights; sharded where the model is."""
    if world.mesh is None:
        return cast(STDiT, copy.deepcopy(model).float())
    average = build_sharded_model(STDiT.arguments(model.config), world.mesh, world.device())
    copy_shards(model, average)
    return average


def full_model(model: STDiT, world: World) -> STDiT | None:
    """Return a model with all its weights on rank 0, None on the other ranks; every rank must call this.

    A sharded model is gathered on the CPU.
    """
    if world.mesh is None:
        return model
    weights = full_state_dict(model)
    if not world.is_main:
        return None
    with torch.device("meta"):
        full = STDiT(**STDiT.arguments(model.config))
    full.load_state_dict(weights, assign=True)
    return cast(STDiT, full.eval().requires_grad_(False))


def build_sharded_model(
    arguments: Mapping[str, Any],
    mesh: ParallelMesh,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: Checkpointing = False,
    compiled: bool = False,
    shapes: int = 1,
) -> STDiT:
    """Build an STDiT over the processes of a mesh; no process ever holds all of its weights.

    The weights are float32 shards without values, to be filled by `load_full_state_dict`. The null caption, a buffer,
    is whole on every process.

    Args:
        arguments: arguments of STDiT.
        mesh: process groups.
        device: device of this process's shards.
        dtype: precision in which weights are gathered and computed (bfloat16); gradients are summed in float32
            either way. Inputs are not cast, because timesteps would be rounded: call the model under autocast.
            [default: float32]
        checkpointing: see `apply_ac`.
        compiled: whether to compile the blocks.
        shapes: see `apply_compile`.
    """
    with torch.device("meta"):
        model: STDiT = STDiT(**arguments)
    if mesh.sequence is not None:
        share_clips(model, mesh.sequence)
    apply_ac(model, checkpointing)
    if compiled:
        apply_compile(model, shapes)
    apply_fsdp(model, mesh, dtype)
    model.to_empty(device=device)
    return model


def apply_ac(model: STDiT, checkpointing: Checkpointing) -> None:
    """Apply activation checkpointing to each block of a model that is not sharded yet.

    Args:
        model: changed in place.
        checkpointing: true keeps only the block's input for the backward and recomputes the rest (Chen et al. 2016);
            "selective" keeps the results of matrix products and attention too; False changes nothing.
    """
    options = {"context_fn": _selective_contexts} if checkpointing == "selective" else {}
    for block in model.blocks if checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)  # type: ignore[method-assign]


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(
        lambda _context, operation, *_args, **_kwargs: (
            CheckpointPolicy.MUST_SAVE if operation.overloadpacket in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


def apply_compile(model: STDiT, shapes: int = 1) -> None:
    """Compile each block by itself with torch.compile, after `apply_ac`: for each shape of clips anew, for speed.

    torch's limits of such graphs, which hold for the whole process, are raised to what the shapes need. A block is not
    compiled for shapes beyond the limits, which are a warning: torch itself would go on more slowly.

    Args:
        model: changed in place.
        shapes: number of shapes of clips: the buckets of the run.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS * shapes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    limits.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        compiled = torch.compile(block.forward, dynamic=False)
        block.forward = partial(_compiled_or_eager, compiled, block.forward)  # type: ignore[method-assign]


def _compiled_or_eager(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], *args: Any) -> Tensor:
    try:
        return compiled(*args)
    except FailOnRecompileLimitHit:
        _warn_of_limit(torch._dynamo.config.recompile_limit)
        return eager(*args)


@cache
def _warn_of_limit(limit: int) -> None:
    log.warning(
        "compile: the blocks have been compiled %d times, the limit; other shapes of clips are computed without "
        "compilation, more slowly. Use fewer data.buckets, or --set compile=false",
        limit,
    )


def apply_fsdp(model: STDiT, mesh: ParallelMesh, dtype: torch.dtype | None = None) -> None:
    """Shard a model over a mesh with FSDP2: a block's weights are gathered for its forward and for its backward.

    The rest (embeddings, timestep, final layer) stays gathered from the forward to the backward.

    Args:
        model: changed in place.
        mesh: process groups.
        dtype: precision in which weights are gathered. [default: float32]
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.weights, mp_policy=policy)
    fully_shard(model, mesh=mesh.weights, mp_policy=policy)
    model.forward = partial(_no_view, model.forward)  # type: ignore[method-assign]


def set_gradient_reduction(model: nn.Module, *, last: bool, once: bool) -> None:
    """Set whether the next backward of a sharded model sums the gradients over the processes.

    Args:
        model: a model as `apply_fsdp` leaves it; any other is not changed.
        last: whether the next micro-batch is the last one of its step, in which the gradients are always summed.
        once: whether the gradients of the others stay unsummed, 4 bytes a parameter on each process. Otherwise they are
            summed among the shards in every micro-batch; among the replicas, in the last one either way.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not once)
        model.set_requires_all_reduce(last)


def _no_view(forward: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Run STDiT.forward inside FSDP's own hooks, which miss an in-place change of a view."""
    output = forward(*args, **options)
    return output.clone() if output._is_view() else output
