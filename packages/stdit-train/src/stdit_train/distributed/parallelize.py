"""What is put on a single-device model from outside before it is trained, and in which order.

Sequence parallelism changes what an attention computes, so it goes on first; then activation checkpointing, then
compilation, block by block; then sharding (FSDP2), whose hooks surround each block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stdit_model import STDiT
from stdit_model.model import TextCache
from stdit_train.config.schema import Checkpointing, TrainConfig, model_arguments
from stdit_train.distributed.mesh import ParallelMesh
from stdit_train.distributed.sequence_parallel import share_clips

_aten = torch.ops.aten


PRODUCTS = {  # what selective checkpointing keeps: dear to compute, and no larger than what it was computed from
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
}


def parallel_model(
    arguments: dict[str, Any],
    mesh: ParallelMesh,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: Checkpointing = False,
    compiled: bool = False,
) -> STDiT:
    """An STDiT over the processes of a mesh, of which no process ever holds the whole.

    Its weights are float32 shards without values: `stdit_train.distributed.sharded_weights.fill` gives them some.
    The null caption, a buffer, is whole on every process.

    Args:
        arguments: STDiT's.
        mesh: the processes.
        device: of this process's shards.
        dtype: that weights are gathered and computed in (bfloat16); gradients are summed in float32 all the same.
            None is float32. Inputs are not cast: timesteps would be rounded. Call the model under autocast then.
        checkpointing, compiled: see `outfit`.
    """
    with torch.device("meta"):
        model = STDiT(**arguments)
    if mesh.sequence is not None:
        share_clips(model, mesh.sequence)
    outfit(model, checkpointing, compiled)
    shard(model, mesh, dtype)
    model.to_empty(device=device)
    return model


def outfit(model: STDiT, checkpointing: Checkpointing = False, compiled: bool = False) -> None:
    """Put checkpointing and compilation on a model's blocks.

    Args:
        model: as it is trained, not sharded yet.
        checkpointing: True keeps only each block's input for the backward and computes the rest anew (Chen et al.
            2016); "selective" keeps the results of matrix products and attention too, and computes only the rest anew.
        compiled: each block by itself, with torch.compile.
    """
    options = {"context_fn": _keep_products} if checkpointing == "selective" else {}
    for block in model.blocks:
        if checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)  # type: ignore[method-assign]
        if compiled:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(
        lambda _context, operation, *_args, **_kwargs: (
            CheckpointPolicy.MUST_SAVE if operation.overloadpacket in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


def shard(model: STDiT, mesh: ParallelMesh, dtype: torch.dtype | None = None) -> None:
    """FSDP2 over a mesh: a block's weights are gathered for its forward and for its backward, and given up after each.

    The caption's keys and values are computed before the first block runs, for all of them (`STDiT.encode_text`), so
    those layers' weights are gathered together and apart from their blocks. What is left (embeddings, timestep, final
    layer) stays gathered from the forward to the backward.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard([block.cross_attn.kv_linear for block in model.blocks], mesh=mesh.weights, mp_policy=policy)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.weights, mp_policy=policy)
    fully_shard(model, mesh=mesh.weights, mp_policy=policy)
    encode_text = model.encode_text
    model.forward = partial(_encoding_text, encode_text, model.forward)  # type: ignore[method-assign]
    register_fsdp_forward_method(model, "encode_text")  # samplers call it by itself


def _encoding_text(
    encode_text: Callable[[Tensor, Tensor | None], TextCache],
    forward: Callable[..., Tensor],
    x: Tensor,
    timestep: Tensor,
    y: Tensor | TextCache,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """STDiT.forward, which within FSDP's own hooks must not go through the hooks of `encode_text` again."""
    if not isinstance(y, TextCache):
        y, mask = encode_text(y, mask), None
    output = forward(x, timestep, y, mask, **options)
    return output.clone() if output._is_view() else output  # an in-place change of a view would pass FSDP's hooks by


def gathered(model: STDiT) -> dict[str, Tensor]:
    """All weights of a sharded model, whole, on the CPU of the first process; empty on the others, which all take part.

    For saving: `STDiT.save_pretrained` knows no shards.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast("dict[str, Tensor]", state)


def build_model(config: TrainConfig, latent_channels: int, caption_channels: int) -> STDiT:
    """The transformer of a run, initialised from (seed), its channels those of the VAE and the text encoder."""
    torch.manual_seed(config.seed)
    return STDiT(**model_arguments(config, latent_channels, caption_channels))
