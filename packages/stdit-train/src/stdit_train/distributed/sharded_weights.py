"""Fill, copy and gather the weights of a sharded model, one full tensor at a time.

init_weights(arguments, seed)   a file's tensors          another sharded model
              |   (name, full tensor)   |                           |
              +-----------+-------------+                           |
                          v                                         v
                load_full_state_dict                           copy_shards
          each rank keeps its own shard                    shard by shard, no messages
                          |                                         |
                          +--------->  sharded model  <-------------+
                                             |
                                             v
                                      full_state_dict: whole, on the CPU of rank 0
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stdit_model import STDiT
from stdit_model.errors import WeightsError, few


def init_weights(arguments: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial weights of an STDiT by name, one full tensor at a time.

    They equal, to the bit, those of `torch.manual_seed(seed)` followed by `STDiT(**arguments)`, but no two of them are
    in memory together: the model is built on the meta device while the state of the generator is recorded before each
    random fill, and each tensor is drawn later from the recorded state.

    Args:
        arguments: arguments of STDiT.
        seed: seed of the run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _RecordInit() as recorded, torch.device("meta"):
            model = STDiT(**arguments)
    for name, tensor in model.state_dict().items():
        yield name, tensor if tensor.device.type == "cpu" else recorded.value(tensor)


class _RecordInit(TorchDispatchMode):
    """Record how each tensor of a model gets its values while the model is built on the meta device.

    New random tensors (tables, the null caption) are small and made at once. A tensor filled in place is drawn into a
    temporary one, which advances the generator, and can be drawn again by `value`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fills: dict[int, tuple[Any, tuple[Any, ...], Tensor]] = {}  # by storage, which views share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.randn.default, torch.ops.aten.rand.default):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        if func in _FILLS and args[0].is_meta:
            storage = args[0].untyped_storage()._cdata
            self._fills[storage] = (func, (args[0].shape, *args[1:]), torch.get_rng_state())
            func(torch.empty(args[0].shape, device="cpu"), *args[1:])
        return func(*args, **kwargs)

    def value(self, tensor: Tensor) -> Tensor:
        """Draw what the last fill put into a tensor of the model."""
        func, (shape, *rest), state = self._fills[tensor.untyped_storage()._cdata]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return cast(Tensor, func(torch.empty(shape), *rest)).view(tensor.shape)


_FILLS = (
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
)


@torch.no_grad()
def load_full_state_dict(model: STDiT, tensors: Iterable[tuple[str, Tensor]], *, allow_missing: bool = False) -> None:
    """Load full tensors into a model, sharded or not; every rank reads all of them and keeps its shards.

    Args:
        model: filled in place.
        tensors: full tensors by name, the same on every rank.
        allow_missing: whether weights without a tensor keep their values.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    targets = model.state_dict()
    missing = set(targets)
    for name, tensor in tensors:
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            expected = "no such tensor" if target is None else list(target.shape)
            raise WeightsError(f"{name} of shape {list(tensor.shape)}: this model has {expected}")
        if isinstance(target, DTensor):
            tensor = tensor.to(target.to_local().device, target.dtype)
            own = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(own.to_local())
        else:
            target.copy_(tensor)
        missing.discard(name)
    if missing and not allow_missing:
        raise WeightsError(f"{len(missing)} tensors are missing: {few(sorted(missing))}")


@torch.no_grad()
def copy_shards(source: STDiT, destination: STDiT) -> None:
    """Copy the weights of a model into another one over the same mesh, shard by shard, without messages."""
    values = source.state_dict()
    for name, target in destination.state_dict().items():
        target.copy_(values[name])


def full_state_dict(model: STDiT) -> dict[str, Tensor]:
    """Gather the weights of a sharded model on the CPU of rank 0; every rank must call this, the others get {}."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast("dict[str, Tensor]", state)
