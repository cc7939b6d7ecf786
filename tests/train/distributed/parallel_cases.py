"""Run by test_parallelize.py: each case on several processes and on one, and how far apart they are (see run_cases.py).

A case is a function below with its arguments, as in "train:seq:fsdp".
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from count_traffic import CountTraffic
from run_cases import run_cases
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stdit_model import STDiT
from stdit_model.sampling.denoise import Denoiser, Guidance
from stdit_model.sampling.schedulers import flow_scheduler, iddpm_scheduler
from stdit_train.checkpoint.format import finish_write, load_checkpoint, named_tensors
from stdit_train.checkpoint.verify import checkpoint_name, verify
from stdit_train.components.load import load_components
from stdit_train.config.load import load_stage
from stdit_train.config.schema import ObjectiveConfig, model_arguments
from stdit_train.distributed.dims import ParallelDims
from stdit_train.distributed.mesh import build_mesh
from stdit_train.distributed.parallelize import build_sharded_model
from stdit_train.distributed.sharded_weights import (
    copy_shards,
    full_state_dict,
    init_weights,
    load_full_state_dict,
)
from stdit_train.distributed.world import DistributedWorld, World
from stdit_train.estimate.parallel import traffic
from stdit_train.loss.objective import training_loss
from stdit_train.optim.ema import Ema
from stdit_train.optim.optimizers import clip_gradients
from stdit_train.pipeline import save

CPU = torch.device("cpu")
BATCH, FRAMES, SIDE = 4, 5, 6  # 5 frames of 3x3 tokens: neither is even


def arguments(variant: str, **changes: Any) -> dict[str, Any]:
    sizes = {"depth": 3, "hidden_size": 32, "num_heads": 4, "caption_channels": 24, "model_max_length": 7}
    return {"variant": variant, **sizes, **changes}


def dims(how: str) -> ParallelDims:
    world = dist.get_world_size()
    settings = {
        "fsdp": {},
        "dp": {"replicate": world},
        "hsdp": {"replicate": 2},
        "sp": {"sequence": world},
        "sp2": {"sequence": 2},  # FSDP x SP
        "hsdp-sp2": {"replicate": 2, "sequence": 2},
    }
    return ParallelDims(world, **settings[how])


def weights(settings: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random ones: a fresh model has zeros that would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in STDiT(**settings).state_dict().items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def batch(frames: int = FRAMES, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(BATCH, 7)
    mask[1, 3:] = mask[2, 1:] = 0
    return {
        "x0": torch.randn(BATCH, 4, frames, SIDE, SIDE, generator=generator),
        "noise": torch.randn(BATCH, 4, frames, SIDE, SIDE, generator=generator),
        "level": torch.rand(BATCH, generator=generator),
        "y": torch.randn(BATCH, 7, 24, generator=generator),
        "mask": mask,
        "drop": torch.tensor([False, False, False, True]),
    }


def loss_of(model: STDiT, samples: dict[str, Tensor]) -> Tensor:
    return training_loss(model, ObjectiveConfig(), **samples)["loss"].mean()


def share(samples: dict[str, Tensor], rank: int, of: int) -> dict[str, Tensor]:
    return {name: tensor.chunk(of)[rank] for name, tensor in samples.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its own largest value."""
    assert found.keys() == expected.keys()
    return max((float((found[n] - e).abs().max() / e.abs().max().clamp(min=1e-12)) for n, e in expected.items()))


def without_key_biases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors with the biases of keys zeroed, and these biases: their true gradient is zero, Adam makes noise of it."""
    rest, keys = {}, {}
    for name, tensor in tensors.items():
        rest[name] = tensor.clone()
        if name.endswith(("qkv.bias", "kv_linear.bias")):
            parts = 3 if "qkv" in name else 2
            rest[name].chunk(parts)[parts - 2].zero_()
            keys[name] = tensor.chunk(parts)[parts - 2]
    return rest, keys


def steps(model: STDiT, make: Callable[[Any], torch.optim.Optimizer], samples: dict[str, Tensor]) -> list[float]:
    """Three steps; this process's losses."""
    optimizer, losses = make(model.parameters()), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, samples)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value.detach()).clone() for name, value in model.named_parameters()}


def train(variant: str, how: str, *options: str) -> dict[str, float]:
    """Losses, gradients and weights after three steps. Options: checkpointing, patch2, even."""
    settings = arguments(variant, **({"patch_size": (2, 2, 2)} if "patch2" in options else {}))
    samples = batch(6 if {"patch2", "even"} & set(options) else FRAMES)
    checkpointing = "checkpointing" in options
    mesh = build_mesh(dims(how), CPU)
    start = weights(settings)

    def parallel() -> STDiT:
        model = build_sharded_model(settings, mesh, CPU, checkpointing=checkpointing)
        load_full_state_dict(model, start.items())
        return model

    def alone() -> STDiT:
        model = STDiT(**settings)
        model.load_state_dict(start)
        return model

    ours = share(samples, mesh.dp_rank, mesh.dims.data)
    many, one = parallel(), alone()
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in many.parameters())
    results = {"held": local / sum(p.numel() for p in one.parameters())}
    count = CountTraffic()
    with count:
        mine = loss_of(many, ours)
        mine.backward()
    paper = traffic(
        one.config, mesh.dims, tuple(ours["x0"].shape), itemsize=4, checkpointing="checkpointing" in options
    )
    names = ("gathered", "scattered", "summed", "exchanged")
    results |= {f"counted.{name}": count.by_kind[name] for name in names}
    results |= {f"paper.{name}": getattr(paper, name) for name in names}
    loss = loss_of(one, samples)
    loss.backward()
    mean = mine.detach().clone()
    dist.all_reduce(mean)
    results["loss"] = abs(mean.item() / dist.get_world_size() / loss.item() - 1)
    gradients = [{n: whole(p.grad) for n, p in model.named_parameters()} for model in (many, one)]
    results["gradients"] = apart(*gradients)
    makes = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True),
    }
    for name, make in makes.items():
        many, one = parallel(), alone()
        steps(many, make, ours)
        steps(one, make, samples)
        found, found_keys = without_key_biases(state(many))
        expected, expected_keys = without_key_biases(state(one))
        results[name] = apart(found, expected)
        results[f"{name}.key_biases"] = max(float((found_keys[n] - e).abs().max()) for n, e in expected_keys.items())
        results[f"{name}.moved"] = apart(state(one), {n: start[n] for n, _ in one.named_parameters()})
    return results


def blocks(variant: str, how: str) -> dict[str, float]:
    """Block by block: this process's tokens after it, and their gradients there."""
    settings, samples = arguments(variant), batch()
    mesh = build_mesh(dims(how), CPU)
    many, one = build_sharded_model(settings, mesh, CPU), STDiT(**settings)
    results = {}
    seen: list[list[Tensor]] = [[], []]
    for model, part, outputs in zip(
        (many, one), (share(samples, mesh.dp_rank, mesh.dims.data), samples), seen, strict=True
    ):
        load_full_state_dict(model, weights(settings).items())
        for block in model.blocks:
            block.register_forward_hook(lambda _block, _inputs, x_BTSD, kept=outputs: kept.append(x_BTSD))
        loss = loss_of(model, part)
        gradients = torch.autograd.grad(loss, outputs)
        outputs[:] = [*(tokens.detach() for tokens in outputs), *gradients]
    sharing = mesh.dims.sequence
    frames = -(-FRAMES // sharing)
    start = 0 if mesh.sequence is None else dist.get_rank(mesh.sequence) * frames
    times = mesh.dims.data * sharing  # a process's loss is a mean over fewer samples, and `sharing` have the same
    for i, (mine, of_all) in enumerate(zip(*seen, strict=True)):
        expected = of_all.chunk(mesh.dims.data)[mesh.dp_rank][:, start : start + frames]
        if i >= len(model.blocks):
            expected = expected * times
        results[str(i)] = apart({"": mine[:, : expected.shape[1]]}, {"": expected})
    return results


def compiled(variant: str, how: str, backend: str, *options: str) -> dict[str, float]:
    """Three steps with compiled blocks against three without, over the processes. Options: checkpointing, selective."""
    settings, mesh = arguments(variant, depth=2), build_mesh(dims(how), CPU)
    checkpointing: Any = "selective" if "selective" in options else "checkpointing" in options
    ours = share(batch(), mesh.dp_rank, mesh.dims.data)
    torch.compile = partial(torch.compile, backend=backend)
    graphs, losses, states = [0], [], []
    for compiling in (False, True):
        torch._dynamo.reset()
        model = build_sharded_model(settings, mesh, CPU, checkpointing=checkpointing, compiled=compiling)
        load_full_state_dict(model, weights(settings).items())
        losses.append(steps(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1), ours))
        states.append(state(model))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {
        "loss": max(abs(mine / other - 1) for mine, other in zip(*losses, strict=True)),
        "weights": apart(states[1], states[0]),
        "moved": apart(states[0], {name: weights(settings)[name] for name in states[0]}),
        "graphs": float(graphs[2]),
    }


def sample(variant: str, how: str, sampler: str) -> dict[str, float]:
    """Guided sampling over the processes and on each of them alone."""
    settings = arguments(variant)
    mesh = build_mesh(dims(how), CPU)
    many, one = build_sharded_model(settings, mesh, CPU).eval(), STDiT(**settings).eval()
    start = weights(settings)
    load_full_state_dict(many, start.items())
    one.load_state_dict(start)
    samples = batch()
    videos = []
    for model in (many, one):
        scheduler = {"iddpm": iddpm_scheduler, "flow": flow_scheduler}[sampler]()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            y = torch.cat([samples["y"], model.null_caption(BATCH, 7)])
            text = model.encode_text(y, torch.cat([samples["mask"]] * 2))
            denoiser = Denoiser(model, scheduler, text, 4, generator, Guidance(3.0))
            videos.append(denoiser(samples["noise"]))
    return {"video": apart({"": videos[0]}, {"": videos[1]}), "moved": apart({"": videos[1]}, {"": samples["noise"]})}


def along_the_way(how: str) -> dict[str, float]:
    """The videos of three prompts along the way, over the processes and on each alone; prompts encoded here."""
    config = load_stage("demo", {"model.depth": 2, "data.frames": 4, "sampling.steps": 3, "micro_batch": 1})
    components = load_components("demo", "demo", CPU, "fp32")
    settings = model_arguments(config, components.vae.config.latent_channels, components.caption_channels)
    mesh = build_mesh(dims(how), CPU)
    many, one = build_sharded_model(settings, mesh, CPU).eval(), STDiT(**settings).eval()
    start = weights(settings)
    load_full_state_dict(many, start.items())
    one.load_state_dict(start)
    encoded, written = [0], []

    def count(_encoder: Any, _arguments: Any, inputs: dict[str, Tensor]) -> None:
        encoded[0] += len(inputs["input_ids"])

    components.text_encoder.register_forward_pre_hook(count, with_kwargs=True)
    save._write_samples = lambda _folder, videos, *_: written.append(videos)  # type: ignore[assignment, func-returns-value]
    prompts = ["a red circle", "a blue bar moving left", ""]
    rank = dist.get_rank()
    many_worlds = DistributedWorld(rank, dist.get_world_size(), rank, mesh)
    for model, world in ((many, many_worlds), (one, World())):
        save.draw_samples(model, components, config, prompts, Path() if world.is_main else None, 1, world)
    alone = written[-1]
    return {
        "encoded": float(encoded[0] - len(prompts)),
        "videos": float((written[0] - alone).abs().max()) if len(written) > 1 else 0.0,
        "different": min(float((alone[i] - alone[i - 1]).abs().max()) for i in range(3)),
    }


def rest(variant: str, how: str) -> dict[str, float]:
    """Clipping, the average, gathering, fresh weights, bfloat16."""
    settings, samples = arguments(variant), batch()
    mesh = build_mesh(dims(how), CPU)
    ours = share(samples, mesh.dp_rank, mesh.dims.data)
    many, average, one = (
        build_sharded_model(settings, mesh, CPU),
        build_sharded_model(settings, mesh, CPU),
        STDiT(**settings),
    )
    load_full_state_dict(many, init_weights(settings, 5))
    load_full_state_dict(one, init_weights(settings, 5))
    results = {"fresh": apart(state(many), state(one))}
    start = weights(settings)
    load_full_state_dict(many, start.items())
    load_full_state_dict(one, start.items())
    copy_shards(many, average)
    emas = Ema(many, 0.9, average), Ema(one, 0.9)
    norms = []
    for model, ema, part in zip((many, one), emas, (ours, samples), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, part).backward()
        norms.append(clip_gradients(model, 0.5).item())
        optimizer.step()
        ema.update(model)
    results["norm"] = abs(norms[0] / norms[1] - 1)
    results["clipped"] = apart(state(many), state(one))
    results["ema"] = apart(state(emas[0].model), state(emas[1].model))
    with torch.no_grad():
        outputs = [ema.model(samples["x0"], samples["level"] * 1000, samples["y"]) for ema in emas]
    results["ema_forward"] = apart({"": outputs[0]}, {"": outputs[1]})
    saved = full_state_dict(many)
    expected = one.state_dict()
    results["gathered"] = apart(saved, expected) if dist.get_rank() == 0 else float(len(saved))
    return results | _bfloat16(settings, mesh, ours, samples, start)


def _bfloat16(settings: Any, mesh: Any, ours: Any, samples: Any, start: dict[str, Tensor]) -> dict[str, float]:
    """Weights gathered in bfloat16 against a bfloat16 copy of a whole model; what the timestep embedding is given."""
    many, one = build_sharded_model(settings, mesh, CPU, dtype=torch.bfloat16), STDiT(**settings)
    load_full_state_dict(many, start.items())
    one.load_state_dict(start)
    seen: list[Tensor] = []
    many.t_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    half = copy.deepcopy(one).bfloat16()
    half.y_embedder.y_embedding = one.y_embedder.y_embedding
    for model, part in ((many, ours), (half, samples)):
        timestep = torch.full((len(part["x0"]),), 997.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(part["x0"], timestep, part["y"], part["mask"]).float() - 1).square().mean()
        loss.backward()
    gradients = [{n: whole(p.grad).float() for n, p in model.named_parameters()} for model in (many, half)]
    flat = [torch.cat([g.flatten() for g in part.values()]) for part in gradients]
    return {
        "bf16.timestep": float(seen[0][0]),
        "bf16.gradients": float((flat[0] - flat[1]).norm() / flat[1].norm()),
        "bf16.stored_in": float(next(many.parameters()).dtype == torch.float32),
    }


def resume(folder: str, how: str, first: str, last: str) -> dict[str, float]:
    """Go on from step `first`'s checkpoint in `folder` (from fresh weights if 0) to `last`, and save; the losses."""
    settings = arguments("seq")
    mesh = build_mesh(dims(how), CPU)
    model, average = build_sharded_model(settings, mesh, CPU), build_sharded_model(settings, mesh, CPU)
    load_full_state_dict(model, weights(settings).items())
    copy_shards(model, average)
    ema = Ema(model, 0.9, average)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    if int(first):
        checkpoint = verify(Path(folder) / checkpoint_name(int(first)), "run")
        load_checkpoint(checkpoint, model, ema.model, [optimizer])
    world, losses = DistributedWorld(dist.get_rank(), dist.get_world_size()), {}
    for step in range(int(first), int(last)):
        samples = share(batch(seed=step), mesh.dp_rank, mesh.dims.data)
        optimizer.zero_grad()
        loss = loss_of(model, samples)
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses[f"loss.{step}"] = sum(row[0] for row in world.gather_numbers([loss.item()])) / world.size
    final = Path(folder) / checkpoint_name(int(last))
    dcp.save(named_tensors(model, ema.model, [optimizer]), checkpoint_id=final.with_suffix(".partial") / "tensors")
    if dist.get_rank() == 0:
        finish_write(final.with_suffix(".partial"), final, {"run": "run", "optimizers": ["AdamW"]})
    dist.barrier()
    return losses | {"average": sum(float(value.double().norm()) for value in state(ema.model).values())}


if __name__ == "__main__":
    run_cases(globals())
