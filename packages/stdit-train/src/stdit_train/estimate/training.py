"""Estimate what a training run needs before anything is allocated: parameters, tokens, FLOPs, memory."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from stdit_model import flops
from stdit_train import hardware
from stdit_train.components.sizes import component_config, vae_stride
from stdit_train.config.batches import check_shared_tokens, clips_per_step, step_batches
from stdit_train.config.resolve import cached_text_width
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.errors import ConfigError
from stdit_train.hardware import GIB

if TYPE_CHECKING:
    from stdit_train.distributed.mesh import ParallelDims

HEADROOM = 0.9  # share of the free memory that a micro-batch is chosen for


@dataclass(frozen=True)
class Estimate:
    """The needs of one training step: memory in bytes per process, FLOPs of all samples, with recomputation."""

    config: TrainConfig
    parameters: int
    temporal_parameters: int
    latent: tuple[int, int, int, int]  # C, T, H, W
    tokens: int  # per sample
    step_flops: int
    micro_batch: int
    memory: dict[str, int]
    assumed: list[str]  # notes on components that are not here, whose sizes are taken from published ones
    caption_channels: int = 0
    processes: int = 1
    data_ranks: int = 1  # that the global batch is divided by
    replicas: int = 1  # of the weights

    @property
    def global_batch(self) -> int:
        """Return the samples per step; of a token budget, clips of the run's own shape, which vary with the bucket."""
        return clips_per_step(self.config, self.data_ranks)

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches per step on each process."""
        return max(1, self.global_batch // self.data_ranks // self.micro_batch)

    @property
    def reduce_once(self) -> bool:
        """Return whether gradients are summed over the processes once a step, and are whole on each until then."""
        return self.processes > 1 and self.accumulation > 1 and self.config.reduce_once is not False

    @property
    def total_memory(self) -> int:
        """Return the bytes at the peak of a step.

        In the backward pass activations are freed as gradients are made, so the larger of the two counts; with
        accumulation the gradients of earlier micro-batches are held all along.
        """
        passing = self.memory["activations"], self.memory["gradients"]
        lasting = sum(self.memory.values()) - sum(passing)
        return lasting + (max(passing) if self.accumulation == 1 else sum(passing))


def estimate_run(config: TrainConfig, available: int | None = None, dims: "ParallelDims | None" = None) -> Estimate:
    """Estimate one step of a run.

    Args:
        config: of the run. Without a micro-batch, the largest divisor of a rank's share of the batch that fits is used.
        available: bytes of memory. [default: what is free on this machine]
        dims: how the processes share the run. [default: one process]

    Raises:
        ConfigError: the processes don't divide the global batch.
    """
    available = hardware.available_memory() if available is None else available
    ranks = dims.data if dims is not None else 1
    batch = clips_per_step(config, ranks)
    check_shared_tokens(config, ranks)
    if batch % ranks:
        from stdit_train.distributed.mesh import nearest_batch

        raise ConfigError(
            f"{ranks} processes can't share a batch of {batch}: the nearest that they can share is --set "
            f"global_batch={nearest_batch(batch, ranks)}"
        )
    share = batch // ranks
    if config.micro_batch is not None:
        return _estimate(config, min(config.micro_batch, share), dims)
    divisors = [n for n in range(share, 0, -1) if share % n == 0]
    estimates = (_estimate(config, micro, dims) for micro in divisors)
    smallest = None
    for smallest in estimates:
        if smallest.total_memory <= HEADROOM * available:
            break
    assert smallest is not None
    return smallest


def _estimate(config: TrainConfig, micro_batch: int, dims: "ParallelDims | None") -> Estimate:
    vae = component_config(config.data.vae, "vae")
    channels, stride = vae.values["latent_channels"], vae_stride(vae.values)
    notes = [vae.note]
    caption_channels, text_parameters = cached_text_width(config), 0
    if caption_channels is None:  # else the texts are in the cache, and no text encoder is kept
        text = component_config(config.data.text_encoder, "text_encoder")
        caption_channels, text_parameters = text.values["d_model"], text.parameters
        notes.append(text.note)
    model = model_arguments(config, channels, caption_channels)
    latent = (channels, config.data.frames, config.data.height // stride, config.data.width // stride)
    patch = config.model.patch_size
    tokens = (latent[1] // patch[0]) * (latent[2] // patch[1]) * (latent[3] // patch[2])
    count = flops.parameters(model)
    half = config.precision != "fp32"
    itemsize = 2 if half else 4
    states = 2 if config.optimizer.name == "adamw" else 1  # of most parameters
    checkpointing = config.activation_checkpointing is True  # selective: less than without, and no products twice
    shape = (micro_batch, *latent)
    batch = clips_per_step(config, dims.data if dims is not None else 1)
    if dims is None or dims.world_size == 1:
        memory = {
            "weights": 4 * count.total + (2 * count.total if half else 0),  # autocast, too, keeps a copy in half
            "gradients": 4 * count.total,
            "optimizer": 4 * states * count.total,
            "EMA": 4 * count.total,
            "activations": flops.activation_bytes(model, shape, None, itemsize, checkpointing),
        }
    else:
        from stdit_train.estimate.parallel import sharded_memory

        unreduced = micro_batch * dims.data < batch and config.reduce_once is not False
        part = sharded_memory(model, dims, shape, itemsize=itemsize, checkpointing=checkpointing, unreduced=unreduced)
        memory = {
            "weights": part["weights"] + part["gathered"],
            "gradients": part["gradients"],
            "optimizer": part["optimizer"] * states // 2,
            "EMA": part["average"],
            "activations": part["activations"],
        }
    memory["VAE and text encoder"] = 4 * vae.parameters + itemsize * text_parameters
    return Estimate(
        config=config,
        parameters=count.total,
        temporal_parameters=count.temporal,
        latent=latent,
        tokens=tokens,
        step_flops=flops.train_flops(model, (batch, *latent), None, checkpointing),
        micro_batch=micro_batch,
        memory=memory,
        assumed=[note for note in notes if note],
        caption_channels=caption_channels,
        processes=dims.world_size if dims is not None else 1,
        data_ranks=dims.data if dims is not None else 1,
        replicas=dims.replicate if dims is not None else 1,
    )


class Fit(NamedTuple):
    """A run as it is started on this machine."""

    config: TrainConfig  # with the micro-batch
    notes: list[str]  # what to tell before the start, a line each


def fit_to_memory(
    config: TrainConfig, processes: int = 1, *, micro_batch: int | None = None, force: bool = False
) -> Fit:
    """Choose the micro-batch of a run, the largest that fits into this machine's free memory.

    Args:
        config: of the run; a micro-batch in it is kept.
        processes: that train together.
        micro_batch: what a resumed run has had so far.
        force: start although the smallest does not fit.

    Raises:
        ConfigError: nothing fits, or the processes don't divide the global batch.
    """
    from stdit_train.distributed.mesh import parallel_dims

    available = hardware.available_memory()
    if config.micro_batch is None:
        config = replace(config, micro_batch=micro_batch)
    dims = parallel_dims(config, processes)
    estimate = estimate_run(config, available, dims)
    message, notes = refusal(estimate, available), []
    batch = f"batch {config.global_batch}" if config.data.tokens is None else f"batch of {batch_words(estimate)}"
    if message and not force:
        raise ConfigError(f"{message} (--force starts it anyway)")
    if message:
        notes.append(f"warning: {message}; started anyway")
    if processes > 1:
        notes.append(
            f"{processes} processes: {dims.replicate} x the weights in {dims.shard} shards, "
            f"{dims.sequence} to a clip; {batch} shared by {dims.data}"
        )
    if estimate.reduce_once:
        notes.append(
            f"gradients are summed once per step, {estimate.memory['gradients'] / GIB:.2f} GiB on each until then "
            "(--set reduce_once=false sums them in every micro-batch)"
        )
    if estimate.accumulation > 1:
        parts = estimate.global_batch // estimate.micro_batch
        notes.append(f"stage {config.stage}: {batch} as {parts} micro-batches of {estimate.micro_batch}")
    # Of a token budget a micro-batch is a measure of tokens, and stays what it has been.
    kept = config.micro_batch if config.data.tokens is not None else None
    return Fit(replace(config, micro_batch=kept or estimate.micro_batch), notes)


def batch_words(estimate: Estimate) -> str:
    """Return the samples of a step, in words: `512 samples`, or the clips of each bucket that fill a token budget."""
    config = estimate.config
    if config.data.tokens is None:
        return f"{config.global_batch} samples"
    clips = " or ".join(f"{count} of {bucket}" for bucket, count in step_batches(config).items())
    return f"{config.data.tokens:,} tokens ({clips})"


def refusal(estimate: Estimate, available: int) -> str | None:
    """Return why a run does not fit and what would change that; None if it fits."""
    why = shortfall(estimate, available)
    return None if why is None else f"stage {estimate.config.stage} {why}: {advice(estimate, available)}"


def shortfall(estimate: Estimate, available: int) -> str | None:
    """Return by how much a run does not fit; None if it fits."""
    if estimate.total_memory <= available:
        return None
    return (
        f"needs about {estimate.total_memory / GIB:.1f} GiB at {estimate.micro_batch} "
        f"sample{'s' * (estimate.micro_batch > 1)} at once ({estimate.memory['activations'] / GIB:.1f} of it "
        f"activations), {available / GIB:.1f} GiB are free"
    )


def advice(estimate: Estimate, available: int) -> str:
    """Return what makes a run fit that does not."""
    fixed = sum(estimate.memory.values()) - estimate.memory["activations"]
    config = estimate.config
    ways = []
    if estimate.reduce_once:
        ways.append("--set reduce_once=false")
    if estimate.replicas > 1:
        ways.append("--set replicate=1")
    if fixed > available:
        ways.append("a smaller preset (--set model.preset=S/2)")
    else:
        if not config.activation_checkpointing:
            ways.append("--set activation_checkpointing=true")
        ways.append("fewer frames or a smaller size (--set data.frames=16, data.height=256, data.width=256)")
    ways.append("or a machine with more memory")
    return f"take {', '.join(ways)}"


def to_dict(estimate: Estimate, available: int) -> dict[str, Any]:
    """Return an estimate for JSON: bytes, FLOPs, and whether it fits.

    Args:
        estimate: of a run.
        available: bytes of memory of each process.
    """
    return {
        "stage": estimate.config.stage,
        "parameters": estimate.parameters,
        "latent": list(estimate.latent),
        "tokens": estimate.tokens,
        "global_batch": estimate.global_batch,
        "micro_batch": estimate.micro_batch,
        "accumulation": estimate.accumulation,
        "reduce_once": estimate.reduce_once,
        "flops_per_step": estimate.step_flops,
        "processes": estimate.processes,
        "memory": estimate.memory,
        "peak_memory": estimate.total_memory,
        "available_memory": available,
        "fits": estimate.total_memory <= available,
    }


def describe(estimate: Estimate) -> list[str]:
    """Return the estimate in lines for people."""
    config = estimate.config
    c, t, h, w = estimate.latent
    shared = ""
    if estimate.processes > 1:
        together = estimate.processes // estimate.data_ranks
        shared = f" on each of {estimate.data_ranks}" + (f" groups of {together} processes" if together > 1 else "")
    lines = [
        f"parameters   {estimate.parameters:,} ({estimate.temporal_parameters:,} of them temporal attention)",
        f"latents      {c}x{t}x{h}x{w}, {estimate.tokens:,} tokens per sample",
        f"batch        {batch_words(estimate)} per step: "
        f"{estimate.accumulation} x {estimate.micro_batch} at once{shared}",
        f"FLOPs        {estimate.step_flops:.3g} per step, {estimate.step_flops * config.steps:.3g} in "
        f"{config.steps:,} steps (matrix products of the transformer)",
        f"memory       about {estimate.total_memory / GIB:.2f} GiB at the peak: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.memory.items()),
    ]
    if estimate.reduce_once:
        lines.append(
            f"gradients    summed once per step, {estimate.memory['gradients'] / GIB:.2f} GiB on each until then; "
            "--set reduce_once=false sums them in every micro-batch"
        )
    lines += [f"assumed      {note}" for note in estimate.assumed]
    return lines
