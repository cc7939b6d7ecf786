"""Estimate what a training run needs before anything is allocated: parameters, tokens, FLOPs, memory."""

from dataclasses import dataclass
from typing import Any

from stdit_model import STDiT, flops
from stdit_train import hardware
from stdit_train.adapters import frozen_bytes, trained_parameters
from stdit_train.components.sizes import component_config, vae_channels, vae_frames, vae_stride
from stdit_train.config.batches import check_shared_tokens, clips_per_step, step_batches
from stdit_train.config.resolve import cached_text_width, is_cached
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.distributed.dims import NODE, ParallelDims, nearest_batch
from stdit_train.errors import ConfigError
from stdit_train.estimate.host import host_memory
from stdit_train.estimate.muon import MuonMemory, muon_memory
from stdit_train.estimate.parallel import sharded_memory
from stdit_train.estimate.phases import STEP, Work, text_itemsize
from stdit_train.hardware import GIB
from stdit_train.vae.networks import discriminator_needs, forward_needs, latent_size

CRITIC_PASSES = 9  # forwards of a discriminator that a step costs, a backward through it counted as one or two
HEADROOM = 0.9  # share of the free memory that a micro-batch is chosen for


@dataclass(frozen=True)
class Estimate:
    """The needs of a run: bytes of memory on each process, and the FLOPs of all samples of a step, with recomputation.

    Attributes:
        memory: of the device in a training step, by part.
        others: of the device in what a run does besides its steps, by name; see `estimate.phases`.
        host: main memory, by what it is for; see `estimate.host`.
    """

    config: TrainConfig
    parameters: int
    temporal_parameters: int
    trained_parameters: int
    latent: tuple[int, int, int, int]  # C, T, H, W
    tokens: int  # per sample
    step_flops: int
    micro_batch: int
    memory: dict[str, int]
    others: dict[str, int]
    host: dict[str, int]
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
        several = self.processes > 1 and self.accumulation > 1
        return several and self.config.reduce_once is not False and not self.config.partial

    @property
    def phases(self) -> dict[str, int]:
        """Return the bytes of the device at the peak of each phase."""
        return {STEP: self.step_memory, **self.others}

    @property
    def peak_phase(self) -> str:
        """Return the phase that takes most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def total_memory(self) -> int:
        """Return the bytes of the device at the peak of the run."""
        return self.phases[self.peak_phase]

    @property
    def host_per_node(self) -> int:
        """Return the bytes of main memory that the processes of a node of 8 GPUs take, or all if they are fewer."""
        return sum(self.host.values()) * min(self.processes, NODE)

    @property
    def step_memory(self) -> int:
        """Return the bytes at the peak of a step.

        In the backward pass activations are freed as gradients are made, so the larger of the two counts; with
        accumulation the gradients of earlier micro-batches are held all along.
        """
        passing = self.memory["activations"], self.memory["gradients"]
        lasting = sum(self.memory.values()) - sum(passing)
        return lasting + (max(passing) if self.accumulation == 1 else sum(passing))


def estimate_run(config: TrainConfig, available: int | None = None, dims: ParallelDims | None = None) -> Estimate:
    """Estimate a run.

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


def _estimate(config: TrainConfig, micro_batch: int, dims: ParallelDims | None) -> Estimate:
    dims = dims or ParallelDims(1)
    if config.network == "vae":
        return _estimate_vae(config, micro_batch, dims)
    vae = component_config(config.data.vae, "vae")
    channels, stride = vae_channels(vae.values), vae_stride(vae.values)
    notes = [vae.note]
    caption_channels, text = cached_text_width(config), None
    if caption_channels is None:  # else the texts are in the cache, and no text encoder is kept
        text = component_config(config.data.text_encoder, "text_encoder")
        caption_channels = text.values["d_model"]
        notes.append(text.note)
    model = STDiT.arguments(model_arguments(config, channels, caption_channels))
    frames = vae_frames(vae.values, config.data.frames)
    latent = (channels, frames, config.data.height // stride, config.data.width // stride)
    patch = config.model.patch_size
    tokens = (latent[1] // patch[0]) * (latent[2] // patch[1]) * (latent[3] // patch[2])
    count = flops.parameters(model)
    trained = trained_parameters(config, model) if config.partial else count.total
    half = config.precision != "fp32"
    itemsize = 2 if half else 4
    muon = (
        muon_memory(model, dims.shard, itemsize)
        if config.optimizer.name == "muon" and not config.partial
        else MuonMemory()
    )
    checkpointing = config.activation_checkpointing is True  # selective: less than without, and no products twice
    shape = (micro_batch, *latent)
    batch = clips_per_step(config, dims.data)
    accumulated = micro_batch * dims.data < batch
    if config.partial or dims.world_size == 1:
        frozen = frozen_bytes(config, model) if config.partial else 0
        states = 1 if config.partial and config.optimizer.name == "muon" else 2
        memory = {
            "weights": frozen + (6 if half else 4) * trained,  # autocast, too, keeps a copy in half of what is trained
            "gradients": 4 * trained,
            "optimizer": 4 * states * trained - 4 * muon.elements,
            "EMA": 4 * trained,
            "activations": flops.activation_bytes(model, shape, None, itemsize, checkpointing),
        }
    else:
        unreduced = accumulated and config.reduce_once is not False
        part = sharded_memory(model, dims, shape, itemsize=itemsize, checkpointing=checkpointing, unreduced=unreduced)
        memory = {
            "weights": part["weights"] + part["gathered"],
            "gradients": part["gradients"],
            "optimizer": part["optimizer"] - 4 * muon.elements,
            "EMA": part["average"],
            "activations": part["activations"],
        }
    memory["VAE and text encoder"] = 4 * vae.parameters + (text_itemsize(config) * text.parameters if text else 0)
    cached = is_cached(config)
    encoder, texts = None if cached else vae.values, None if text is None else text.values
    work = Work(config, model, encoder, vae.values, texts, latent, micro_batch, accumulated, dims, muon)
    host = host_memory(
        config,
        vae.values,
        cached=cached,
        cached_texts=text is None,
        text_states=config.model.model_max_length * caption_channels * text_itemsize(config),
        micro_batch=micro_batch,
        ranks=dims.data,
        shards=2 * memory["EMA"] + memory["optimizer"],
    )
    return Estimate(
        config=config,
        parameters=count.total,
        temporal_parameters=count.temporal,
        trained_parameters=trained,
        latent=latent,
        tokens=tokens,
        step_flops=flops.partial_train_flops(
            model, (batch, *latent), trained, added=config.lora.rank is not None, checkpointing=checkpointing
        )
        if config.partial
        else flops.train_flops(model, (batch, *latent), None, checkpointing),
        micro_batch=micro_batch,
        memory=memory,
        others=work.phases(memory),
        host=host,
        assumed=[note for note in notes if note],
        caption_channels=caption_channels,
        processes=dims.world_size,
        data_ranks=dims.data,
        replicas=dims.replicate,
    )


def _estimate_vae(config: TrainConfig, micro_batch: int, dims: ParallelDims) -> Estimate:
    """Estimate a VAE's run with its discriminator, without features of a perceptual term; each process has all weights.

    The discriminator takes part once `vae.discriminator_start` is reached; a step then has three forwards of it (what
    the VAE made, for either loss, and the true clips), their backwards, and another to balance the gradients.
    """
    data, vae, half = config.data, config.vae, config.precision != "fp32"
    size, checkpointing = (data.frames, data.height, data.width), bool(config.activation_checkpointing)
    needs, latent = forward_needs(vae, 1, *size, checkpointing=checkpointing), latent_size(vae, *size)
    critic = discriminator_needs(vae, 1, *size)
    parameters = needs.parameters + critic.parameters
    memory = {
        "weights": (6 if half else 4) * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "EMA": 4 * needs.parameters,
        "activations": micro_batch * (needs.activations + 3 * critic.activations) // (2 if half else 1),
    }
    step_flops = (4 if checkpointing else 3) * needs.flops + CRITIC_PASSES * critic.flops
    values = {"latent_channels": vae.latent_channels, "block_out_channels": vae.channels}
    values |= {"temporal_compression_ratio": vae.temporal} if vae.kind == "video" else {}
    host = host_memory(
        config,
        values,
        cached=False,
        cached_texts=True,  # there are none
        text_states=0,
        micro_batch=micro_batch,
        ranks=dims.data,
        shards=4 * needs.parameters + 12 * parameters,
    )
    return Estimate(
        config=config,
        parameters=parameters,
        temporal_parameters=0,
        trained_parameters=parameters,
        latent=latent,
        tokens=latent[1] * latent[2] * latent[3],
        step_flops=clips_per_step(config, dims.data) * step_flops,
        micro_batch=micro_batch,
        memory=memory,
        others={},
        host=host,
        assumed=[] if vae.perceptual is None else ["the features of the perceptual term are not counted"],
        processes=dims.world_size,
        data_ranks=dims.data,
    )


def batch_words(estimate: Estimate) -> str:
    """Return the samples of a step, in words: `512 samples`, or the clips of each bucket that fill a token budget."""
    config = estimate.config
    if config.data.tokens is None:
        return f"{config.global_batch} samples"
    clips = " or ".join(f"{count} of {bucket}" for bucket, count in step_batches(config).items())
    return f"{config.data.tokens:,} tokens ({clips})"


def to_dict(estimate: Estimate, available: int) -> dict[str, Any]:
    """Return an estimate for JSON: bytes, FLOPs, and whether it fits.

    Args:
        estimate: of a run.
        available: bytes of memory of each process.
    """
    return {
        "stage": estimate.config.stage,
        "parameters": estimate.parameters,
        "trained_parameters": estimate.trained_parameters,
        "latent": list(estimate.latent),
        "tokens": estimate.tokens,
        "global_batch": estimate.global_batch,
        "micro_batch": estimate.micro_batch,
        "accumulation": estimate.accumulation,
        "reduce_once": estimate.reduce_once,
        "flops_per_step": estimate.step_flops,
        "processes": estimate.processes,
        "memory": estimate.memory,
        "phases": estimate.phases,
        "peak_phase": estimate.peak_phase,
        "peak_memory": estimate.total_memory,
        "main_memory": estimate.host,
        "main_memory_per_node": estimate.host_per_node,
        "available_memory": available,
        "fits": estimate.total_memory <= available,
    }


def parameter_words(estimate: Estimate) -> str:
    """Return the number of parameters in words, and of those that are trained if the others are frozen."""
    config, count = estimate.config, f"{estimate.parameters:,}"
    if config.network == "vae":
        return count
    words = f"{count} ({estimate.temporal_parameters:,} of them temporal attention)"
    if not config.partial:
        return words
    what = "the temporal attention" if config.lora.rank is None else f"an adapter of rank {config.lora.rank}"
    return f"{words}, frozen; {estimate.trained_parameters:,} are trained, {what}"


def describe(estimate: Estimate) -> list[str]:
    """Return the estimate in lines for people."""
    config = estimate.config
    c, t, h, w = estimate.latent
    shared = ""
    if estimate.processes > 1:
        together = estimate.processes // estimate.data_ranks
        shared = f" on each of {estimate.data_ranks}" + (f" groups of {together} processes" if together > 1 else "")
    lines = [
        f"parameters   {parameter_words(estimate)}",
        f"latents      {c}x{t}x{h}x{w}, {estimate.tokens:,} tokens per sample",
        f"batch        {batch_words(estimate)} per step: "
        f"{estimate.accumulation} x {estimate.micro_batch} at once{shared}",
        f"FLOPs        {estimate.step_flops:.3g} per step, {estimate.step_flops * config.steps:.3g} in "
        f"{config.steps:,} steps (matrix products of the {'VAE' if config.network == 'vae' else 'transformer'})",
        f"memory       about {estimate.total_memory / GIB:.2f} GiB at the peak, {estimate.peak_phase}",
        f"  {STEP}: {_in_gib(estimate.memory)}",
        f"  at the peak of each phase: {_in_gib(estimate.phases)}",
        f"main memory  about {sum(estimate.host.values()) / GIB:.2f} GiB on each process: {_in_gib(estimate.host)}",
    ]
    if estimate.processes > 1:
        lines[-1] += f"; {estimate.host_per_node / GIB:.1f} GiB on a node of {min(estimate.processes, NODE)}"
    if estimate.reduce_once:
        lines.append(
            f"gradients    summed once per step, {estimate.memory['gradients'] / GIB:.2f} GiB on each until then; "
            "--set reduce_once=false sums them in every micro-batch"
        )
    lines += [f"assumed      {note}" for note in estimate.assumed]
    return lines


def _in_gib(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
