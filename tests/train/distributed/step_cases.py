"""Run by test_step.py: what an optimizer step sends, and whether its results are those of one process."""

from collections import Counter
from dataclasses import fields
from functools import partial

import torch
import torch.distributed as dist
from count_traffic import CountTraffic
from parallel_cases import CPU, apart, arguments, batch, dims, loss_of, share, state, weights, whole
from run_cases import run_cases
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode

from stdit_model import STDiT
from stdit_train.config.schema import OptimizerConfig
from stdit_train.distributed.mesh import build_mesh
from stdit_train.distributed.parallelize import build_sharded_model, set_gradient_reduction
from stdit_train.distributed.sharded_weights import load_full_state_dict
from stdit_train.estimate.parallel import sharded_memory, traffic
from stdit_train.optim.muon import orthogonalised
from stdit_train.optim.optimizers import build_optimizers
from stdit_train.optim.whole_matrices import map_whole_matrices

SHAPES = [(5, 3), (1, 4), (7, 7), (2, 9), (6, 4)]  # some have fewer rows than there are processes


def messages(count: CommDebugMode) -> dict[str, float]:
    """The collectives of each kind."""
    found = Counter({str(kind).split(".")[-1]: float(n) for kind, n in count.get_comm_counts().items()})
    return {name: n for name, n in found.items() if n}


def whole_matrices() -> dict[str, float]:
    """A function of sharded matrices against the same of whole ones, to the bit; its messages."""
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    compute = partial(orthogonalised, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7)
    rank, size = dist.get_rank(), dist.get_world_size()

    def own(matrix: Tensor) -> Tensor:
        parts = matrix.chunk(size)
        return parts[rank] if rank < len(parts) else matrix[:0]

    with CommDebugMode() as count:
        found = map_whole_matrices(compute, [own(matrix) for matrix in matrices], SHAPES, dist.group.WORLD)
    expected = [own(compute(matrix)) for matrix in matrices]
    equal = all(torch.equal(mine, rows) for mine, rows in zip(found, expected, strict=True))
    return {"equal": float(equal), **messages(count)}


def muon(how: str) -> dict[str, float]:
    """Three steps of Muon over the processes and on each alone; the messages of its step."""
    settings, samples, mesh = arguments("seq"), batch(), build_mesh(dims(how), CPU)
    config = OptimizerConfig("muon", lr=2e-5, muon_lr=1e-3)
    start, many, one = weights(settings), build_sharded_model(settings, mesh, CPU), STDiT(**settings)
    for model, part in ((many, share(samples, mesh.dp_rank, mesh.dims.data)), (one, samples)):
        load_full_state_dict(model, start.items())
        optimizers = build_optimizers(model, config)
        for _ in range(3):
            loss_of(model, part).backward()
            with CommDebugMode() as count:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            if model is many:
                sent = messages(count)
    matrices = [n for n, p in one.named_parameters() if any(p is w for w in optimizers[0].param_groups[0]["params"])]
    found, expected = ({n: w for n, w in state(model).items() if n in matrices} for model in (many, one))
    return {
        "matrices": float(len(matrices)),
        "weights": apart(found, expected),
        "moved": apart(expected, {n: start[n] for n in matrices}),
        **sent,
    }


def accumulated(how: str, micro_batches: str, when: str) -> dict[str, float]:
    """Gradients of a step of so many micro-batches, summed `once` or in `each`, against one process; what is sent."""
    settings, mesh, number = arguments("seq"), build_mesh(dims(how), CPU), int(micro_batches)
    halves = [batch(seed=seed) for seed in (7, 8)]
    samples = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    many, one = build_sharded_model(settings, mesh, CPU), STDiT(**settings)
    for model in (many, one):
        load_full_state_dict(model, weights(settings).items())
    ours = share(samples, mesh.dp_rank, mesh.dims.data)
    with CommDebugMode() as count, CountTraffic() as bytes_sent:
        for i in range(number):
            set_gradient_reduction(many, last=i == number - 1, once=when == "once")
            (loss_of(many, share(ours, i, number)) / number).backward()
            if i == 0:
                unreduced = _unreduced_bytes(many)
    loss_of(one, samples).backward()
    gradients = [{n: whole(p.grad) for n, p in model.named_parameters()} for model in (many, one)]
    shape = tuple(share(ours, 0, number)["x0"].shape)
    paper = traffic(one.config, mesh.dims, shape, itemsize=4).of_step(number, when == "once")
    held = sharded_memory(one.config, mesh.dims, shape, itemsize=4, unreduced=True)["gradients"]
    bytes_match = all(bytes_sent.by_kind[field.name] == getattr(paper, field.name) for field in fields(paper))
    return {
        "gradients": apart(*gradients),
        "unreduced": unreduced / held,
        "as_on_paper": float(bytes_match),
        **messages(count),
    }


def _unreduced_bytes(model: FSDPModule) -> int:
    """The bytes of the gradients that are whole on this process."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = {id(state._fsdp_param_group): state._fsdp_param_group for state in states if state._fsdp_param_group}
    found = 0
    for parameter in (parameter for group in groups.values() for parameter in group.fsdp_params):
        gradient = parameter.unsharded_accumulated_grad
        gradient = parameter._unsharded_param.grad if gradient is None else gradient
        found += 0 if gradient is None else gradient.nbytes
    return found


if __name__ == "__main__":
    run_cases(globals())
