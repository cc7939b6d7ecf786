"""Choose the micro-batch of a run by the memory that is free; say how much is missing, and what would change that."""

from dataclasses import replace
from typing import NamedTuple

from stdit_train import hardware
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.dims import parallel_dims
from stdit_train.errors import ConfigError
from stdit_train.estimate.phases import STEP
from stdit_train.estimate.training import Estimate, batch_words, estimate_run
from stdit_train.hardware import GIB


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


def refusal(estimate: Estimate, available: int) -> str | None:
    """Return why a run does not fit and what would change that; None if it fits."""
    why = shortfall(estimate, available)
    return None if why is None else f"stage {estimate.config.stage} {why}: {advice(estimate, available)}"


def shortfall(estimate: Estimate, available: int) -> str | None:
    """Return by how much a run does not fit; None if it fits."""
    if estimate.total_memory <= available:
        return None
    of_it = f"{estimate.memory['activations'] / GIB:.1f} of it activations"
    if estimate.peak_phase != STEP:
        of_it = f"for {estimate.peak_phase}; a {STEP} {estimate.step_memory / GIB:.1f}"
    return (
        f"needs about {estimate.total_memory / GIB:.1f} GiB at {estimate.micro_batch} "
        f"sample{'s' * (estimate.micro_batch > 1)} at once ({of_it}), {available / GIB:.1f} GiB are free"
    )


def advice(estimate: Estimate, available: int) -> str:
    """Return what makes a run fit that does not."""
    fixed = sum(estimate.memory.values()) - estimate.memory["activations"]
    config = estimate.config
    ways = []
    if config.partial and config.frozen == "fp32" and config.precision == "bf16":
        ways.append("--set frozen=bf16")
    if config.lora.rank is not None and config.frozen == "bf16":
        ways.append("--set frozen=int8")
    if estimate.reduce_once:
        ways.append("--set reduce_once=false")
    if estimate.replicas > 1 and not config.partial:
        ways.append("--set replicate=1")
    if fixed > available:
        vae = config.network == "vae"
        ways.append("fewer vae.channels" if vae else "a smaller preset (--set model.preset=S/2)")
    else:
        if not config.activation_checkpointing:
            ways.append("--set activation_checkpointing=true")
        ways.append("fewer frames or a smaller size (--set data.frames=16, data.height=256, data.width=256)")
    ways.append("or a machine with more memory")
    return f"take {', '.join(ways)}"
