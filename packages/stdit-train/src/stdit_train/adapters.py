"""Train a part of a model: a LoRA adapter, or some of its own weights. The rest is frozen.

Frozen weights are in no checkpoint; the average of the weights shares them with the model. Every process has all of
them, and the gradients of the rest are averaged once a step.
"""

import copy
import hashlib
import logging
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdit_data.storage.atomic import write_atomically
from stdit_model import STDiT, STDiTPipeline
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.lora import choose_modules, linear_shapes
from stdit_train.assets import resolve_source
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.components.sources import check_packages
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.parallelize import build_model
from stdit_train.errors import ConfigError

ATTENTION = ("attn", "attn_temp", "cross_attn")  # parts of a block that are adapted by default, where it has them
TEMPORAL = ".attn_temp."  # in the names of the weights of temporal attention

log = logging.getLogger(__name__)


def build_partial(config: TrainConfig, latent_channels: int, caption_channels: int) -> tuple[STDiT, str]:
    """Build the transformer of a run that trains a part of it, on the CPU, with the weights of `config.init`.

    Arguments are those of `build_model`.

    Returns:
        The model, of which what is trained requires gradients and is in float32; and the SHA-256 of the weights that
        it was made from.

    Raises:
        ConfigError: weights of another model, a part that this one does not have, or torchao is not installed.
        SettingsError: likewise; or peft is not installed.
    """
    assert config.init is not None
    check_packages(config)
    model = build_model(config, latent_channels, caption_channels)
    log.info(load_initial(model, resolve_source(config.init)))
    digest = weights_sha256(model)
    model.requires_grad_(False)
    if config.lora.rank is None:
        _train_temporal(model, config)
    else:
        _add_adapter(model, config)
    return model, digest


def _train_temporal(model: STDiT, config: TrainConfig) -> None:
    trained = [parameter for name, parameter in model.named_parameters() if TEMPORAL in name]
    if not trained:
        raise ConfigError(f"--train temporal: the variant {model.config.variant} has no temporal attention")
    _keep_frozen(model, config, trained)
    for parameter in trained:
        parameter.requires_grad_(True)


def _add_adapter(model: STDiT, config: TrainConfig) -> None:
    """Add a LoRA adapter, whose update is zero at first (A as Kaiming He's, B zero)."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    _keep_frozen(model, config, ())
    rank, modules = cast(int, config.lora.rank), adapted_modules(config, model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*without `get_apply_tensor_subclass`"
        )  # merging is into the unrounded weights
        torch.manual_seed(config.seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=cast(int, config.lora.alpha or rank), target_modules=modules))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast does it, without copies of the tokens in float32


def _keep_frozen(model: STDiT, config: TrainConfig, trained: Iterable[nn.Parameter]) -> None:
    """Keep what is not trained in the precision of `config.frozen`, but for the path of the timestep, in float32."""
    if config.frozen == "fp32":
        return
    kept = set(trained)
    for name, parameter in model.named_parameters():
        if parameter not in kept and not _on_timestep_path(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    if config.frozen == "int8":
        _round_blocks(model)


def _on_timestep_path(name: str) -> bool:
    """Whether a weight stays in float32, as in a model that is loaded in another precision."""
    return not set(name.split(".")).isdisjoint(STDiT._keep_in_fp32_modules)


def _round_blocks(model: STDiT) -> None:
    """Round the weights of the blocks' linear layers to 8 bits, with a scale for each output, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for block in model.blocks:
        quantize_(block, Int8WeightOnlyConfig())


def frozen_bytes(config: TrainConfig, arguments: dict[str, Any]) -> int:
    """Count the bytes of the weights that a run with `config.partial` does not train.

    Args:
        config: of the run.
        arguments: of its STDiT.
    """
    total = 0
    for name, shape in STDiT.parameter_shapes(**arguments).items():
        if name == "y_embedder.y_embedding" or (config.lora.rank is None and TEMPORAL in name):
            continue
        if config.frozen == "fp32" or _on_timestep_path(name):
            total += 4 * math.prod(shape)
        elif config.frozen == "int8" and name.startswith("blocks.") and len(shape) == 2:
            total += math.prod(shape) + 5 * shape[0]  # a scale and a zero for each output
        else:
            total += 2 * math.prod(shape)
    return total


def adapted_modules(config: TrainConfig, model: nn.Module) -> list[str]:
    """Return the ends of the names of the linear layers that a run adapts.

    Raises:
        SettingsError: the model has none of a name; the message names the nearest.
    """
    if config.lora.modules is not None:
        return choose_modules(config.lora.modules, model)
    names = {part for layer in linear_shapes(model) for part in layer.split(".")}
    return choose_modules([name for name in ATTENTION if name in names], model)


def trained_parameters(config: TrainConfig, arguments: dict[str, Any]) -> int:
    """Count the parameters that a run with `config.partial` trains, without allocating them.

    Args:
        config: of the run.
        arguments: of its STDiT.

    Raises:
        ConfigError, SettingsError: the model has no such part.
    """
    with torch.device("meta"):
        model: STDiT = STDiT(**arguments)
    model.requires_grad_(False)
    if config.lora.rank is None:
        _train_temporal(model, config)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ends = tuple(f".{name}" for name in adapted_modules(config, model))
    shapes = [shape for name, shape in linear_shapes(model).items() if f".{name}".endswith(ends)]
    return config.lora.rank * sum(map(sum, shapes))


def copy_trained(model: STDiT) -> STDiT:
    """Return a copy of a model that shares its frozen weights and its buffers."""
    shared = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*shared, *model.buffers())})


def in_float32(model: STDiT) -> STDiT:
    """Return a model, or a copy of it, with all its weights in float32."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    return cast(STDiT, copy.deepcopy(model).float())


def average_gradients(model: nn.Module) -> None:
    """Average the gradients of all processes in place, in one message; every process must call this."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    for gradient, part in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def save_adapter(folder: Path, model: STDiT) -> None:
    """Write the adapter of a model in diffusers' format into a folder, as `LORA_FILE`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / LORA_FILE) as partial:
        STDiTPipeline.save_lora_weights(
            partial.parent,
            transformer_lora_layers={
                name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()
            },
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            weight_name=partial.name,
        )


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
