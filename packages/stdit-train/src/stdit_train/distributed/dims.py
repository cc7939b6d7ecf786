"""The parallel dimensions of a run: replicas and shards of the weights, data-parallel ranks, and sequence groups.

W processes hold R replicas of the weights, each in W / R shards; they also form W / P data-parallel ranks of P
processes that share a clip (sequence parallelism). The two are independent of each other: a gradient is the mean over
all W processes however the weights are sharded. Processes that share a clip or a replica have neighbouring ranks, so
that they are on one node where possible.
"""

import os
from dataclasses import dataclass

from stdit_data.buckets import parse_bucket
from stdit_model.presets import Variant
from stdit_train.config.batches import check_shared_tokens
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.errors import ConfigError

NODE = 8  # processes up to which all hold the weights together by default; also the GPUs that a plan gives a node


@dataclass(frozen=True)
class ParallelDims:
    """Number of processes in each dimension.

    Attributes:
        world_size: all processes.
        replicate: replicas of the weights: 1 is FSDP, `world_size` is data parallelism, values between are HSDP.
        sequence: processes that share a clip.

    Raises:
        ConfigError: a dimension does not divide the number of processes.
    """

    world_size: int
    replicate: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name, size in (("replicate", self.replicate), ("sequence", self.sequence)):
            if size < 1 or self.world_size % size:
                fitting = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
                raise ConfigError(
                    f"{name} is {size}, which does not divide {self.world_size} processes: use {' or '.join(fitting)}"
                )

    @property
    def shard(self) -> int:
        """Number of shards of each replica."""
        return self.world_size // self.replicate

    @property
    def data(self) -> int:
        """Number of data-parallel ranks, which divide the global batch."""
        return self.world_size // self.sequence

    def check(self, variant: Variant, num_heads: int, frames: int, global_batch: int | None = None) -> None:
        """Check, before anything is allocated, that a model and its clips can be divided.

        Frames and positions that the sequence dimension does not divide are padded.

        Args:
            variant: variant of the model.
            num_heads: attention heads of the model.
            frames: frames of tokens: latent frames divided by the patch size.
            global_batch: samples of a step. [default: not checked]

        Raises:
            ConfigError: they cannot; the message says which.
        """
        if variant == "dit" and num_heads % self.sequence:
            raise ConfigError(
                f"full attention (dit) splits heads: {self.sequence} processes per clip do not divide {num_heads} heads"
            )
        if self.sequence > frames:
            raise ConfigError(
                f"{self.sequence} processes per clip, but it has {frames} frames of tokens: a process would have none"
            )
        if global_batch is not None and global_batch % self.data:
            raise ConfigError(
                f"a global batch of {global_batch} is not a multiple of the {self.data} data-parallel ranks "
                f"({self.world_size} processes, {self.sequence} a clip): the nearest is --set "
                f"global_batch={nearest_batch(global_batch, self.data)}"
            )


def nearest_batch(batch: int, ranks: int) -> int:
    """Return the multiple of a number of ranks that is nearest to a batch; of two the larger."""
    return max(ranks, (2 * batch + ranks) // (2 * ranks) * ranks)


def node_size() -> int | None:
    """Return the number of processes on this node, as torchrun sets it; None without torchrun."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdigit() else None


def default_replicas(world_size: int, node: int) -> int:
    """Return the replicas of the weights of a run that does not set `replicate`.

    Above 8 processes each node has a replica, sharded among its processes (HSDP): weights are gathered in every
    micro-batch, and the network between nodes is several times slower than the one within.

    Args:
        world_size: all processes.
        node: processes on each node.
    """
    return world_size // node if world_size > NODE and node > 1 and world_size % node == 0 else 1


def parallel_dims(config: TrainConfig, world_size: int, node: int | None = None) -> ParallelDims:
    """Return the parallel dimensions of a run.

    Args:
        config: of the run.
        world_size: number of processes.
        node: processes on each node, for the default of `replicate`. [default: as here under torchrun, else 8]

    Raises:
        ConfigError: the processes do not fit the run; the message says why and what would.
    """
    if world_size == 1:
        return ParallelDims(1)
    # a copy on each process: a VAE is small, and frozen weights need no optimizer
    replicate = world_size if config.network == "vae" or config.partial else config.replicate
    if replicate is None:
        replicate = default_replicas(world_size, node or node_size() or NODE)
    dims = ParallelDims(world_size, replicate or world_size, config.sequence)
    if config.precision == "fp16":
        raise ConfigError("precision=fp16 is for one process; on several use bf16: --set precision=bf16")
    sizes = model_arguments(config, latent_channels=4, caption_channels=1)
    clips = [parse_bucket(bucket).frames for bucket in config.data.buckets] or [config.data.frames]
    batch = config.global_batch if config.data.tokens is None else None  # else buckets have batches of their own
    dims.check(config.model.variant, sizes["num_heads"], min(clips) // config.model.patch_size[0], batch)
    check_shared_tokens(config, dims.data)
    return dims
