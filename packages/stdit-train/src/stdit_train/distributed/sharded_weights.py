"""Values for the weights of a sharded model: fresh, from a file, or from another sharded model.

No process holds more than a tensor of the whole at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stdit_model import STDiT
from stdit_model.errors import WeightsError, few
from stdit_model.weights.load import Weights


def fresh(arguments: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights that `torch.manual_seed(seed)` and then STDiT's constructor give, by name, a tensor at a time.

    The model is built without memory, and of every random number that it asks for the generator's state is noted: so
    each tensor can be drawn by itself later, to the bit.

    Args:
        arguments: STDiT's.
        seed: of the run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _Noting() as noting, torch.device("meta"):
            model = STDiT(**arguments)
    for name, tensor in model.state_dict().items():
        yield name, tensor if tensor.device.type == "cpu" else noting.value(tensor)


class _Noting(TorchDispatchMode):
    """While a model is built on the meta device: how each of its tensors got its values.

    New random tensors are small (tables, the null caption) and made at once; those filled in place are drawn into a
    passing copy, for the generator to move on, and can be drawn again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._filled: dict[int, tuple[Any, tuple[Any, ...], Tensor]] = {}  # by storage, which views share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.randn.default, torch.ops.aten.rand.default):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        if func in _FILLING and args[0].is_meta:
            place = args[0].untyped_storage()._cdata
            self._filled[place] = (func, (args[0].shape, *args[1:]), torch.get_rng_state())
            func(torch.empty(args[0].shape, device="cpu"), *args[1:])
        return func(*args, **kwargs)

    def value(self, tensor: Tensor) -> Tensor:
        """What the last filling of a tensor of the model put into it."""
        func, (shape, *rest), state = self._filled[tensor.untyped_storage()._cdata]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return func(torch.empty(shape), *rest).view(tensor.shape)


_FILLING = (
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
)


def stored(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A file's weights by name, read one at a time."""
    yield from weights.read()


@torch.no_grad()
def fill(model: STDiT, tensors: Iterable[tuple[str, Tensor]], *, partly: bool = False) -> None:
    """Give a sharded model (or a whole one) weights: every process reads all of them and keeps its shards.

    Args:
        model: filled in place.
        tensors: whole tensors by name; the same on every process.
        partly: some may be missing.

    Raises:
        WeightsError: a tensor missing, unknown or of another shape.
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
    if missing and not partly:
        raise WeightsError(f"{len(missing)} tensors are missing: {few(sorted(missing))}")


@torch.no_grad()
def copy_shards(source: STDiT, destination: STDiT) -> None:
    """One model's weights into another over the same mesh, shard by shard, without a message."""
    values = source.state_dict()
    for name, target in destination.state_dict().items():
        target.copy_(values[name])
