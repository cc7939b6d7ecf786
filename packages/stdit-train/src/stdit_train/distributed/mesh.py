"""Which processes share what: copies of the weights, shards of the weights, and parts of each clip.

W processes are R copies of the weights (replicate), each copy cut into W / R shards; and W / P data-parallel ranks,
each P processes that share one clip (sequence). The two views are independent of each other: a gradient is the mean
over all W processes whatever is sharded where. Neighbouring ranks share a clip, and neighbouring ranks are one copy, so
that both stay inside a node where they can.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stdit_data.buckets import parse_bucket
from stdit_model.presets import Variant
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig, model_arguments


@dataclass(frozen=True)
class ParallelDims:
    """How many processes there are, and how they are grouped.

    Raises:
        ConfigError: groups that don't divide the processes.
    """

    processes: int
    replicate: int = 1  # copies of the weights: 1 is FSDP, `processes` plain data parallelism, between them HSDP
    sequence: int = 1  # processes that share each clip

    def __post_init__(self) -> None:
        for name, size in (("replicate", self.replicate), ("sequence", self.sequence)):
            if size < 1 or self.processes % size:
                fitting = [str(n) for n in range(1, self.processes + 1) if self.processes % n == 0]
                raise ConfigError(
                    f"{name} is {size}, which does not divide {self.processes} processes: take {' or '.join(fitting)}"
                )

    @property
    def shard(self) -> int:
        """Processes that each hold one part of a copy of the weights."""
        return self.processes // self.replicate

    @property
    def data(self) -> int:
        """Data-parallel ranks: what the global batch is divided by."""
        return self.processes // self.sequence

    def check(self, variant: Variant, num_heads: int, frames: int, global_batch: int | None = None) -> None:
        """Refuse what can't be shared, before anything is allocated.

        Frames and positions that the group does not divide are padded, and what was padded takes part in nothing.

        Args:
            variant, num_heads: of the model.
            frames: of tokens: latent frames over the patch's.
            global_batch: samples of a step.

        Raises:
            ConfigError: the line names what does not fit.
        """
        if variant == "dit" and num_heads % self.sequence:
            raise ConfigError(
                f"full attention (dit) is shared by heads: {self.sequence} processes a clip do not divide {num_heads} "
                "heads"
            )
        if self.sequence > frames:
            raise ConfigError(
                f"{self.sequence} processes a clip, but it has {frames} frames of tokens: a process would have none"
            )
        if global_batch is not None and global_batch % self.data:
            raise ConfigError(
                f"a global batch of {global_batch} is not a multiple of the {self.data} data-parallel ranks "
                f"({self.processes} processes, {self.sequence} a clip): --set global_batch=..."
            )


@dataclass(frozen=True)
class ParallelMesh:
    """A grouping on running processes.

    Attributes:
        weights: where parameters live: one dimension (shard), or two (replicate, shard).
        data_rank: this process's number among the `grouping.data` data-parallel ranks: the loader's rank.
        sequence: the processes that share this one's clip; None if it has it alone.
    """

    grouping: ParallelDims
    weights: DeviceMesh
    data_rank: int
    sequence: dist.ProcessGroup | None


def build_mesh(grouping: ParallelDims, device: torch.device) -> ParallelMesh:
    """Make the process groups. torch.distributed must be initialised; all processes call this.

    Raises:
        ConfigError: another number of processes is running.
    """
    if dist.get_world_size() != grouping.processes:
        raise ConfigError(f"{grouping.processes} processes expected, {dist.get_world_size()} are running")
    copies, shards = grouping.replicate, grouping.shard
    if copies == 1:
        weights = init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    else:
        weights = init_device_mesh(device.type, (copies, shards), mesh_dim_names=("replicate", "shard"))
    if grouping.sequence == 1:
        return ParallelMesh(grouping, weights, dist.get_rank(), None)
    clips = init_device_mesh(device.type, (grouping.data, grouping.sequence), mesh_dim_names=("data", "sequence"))
    return ParallelMesh(grouping, weights, clips.get_local_rank("data"), clips.get_group("sequence"))


def parallel_dims(config: TrainConfig, processes: int) -> ParallelDims:
    """How a run groups so many processes.

    Raises:
        ConfigError: what of it does not fit, and what would.
    """
    if processes == 1:
        return ParallelDims(1)
    grouping = ParallelDims(processes, config.replicate or processes, config.sequence)
    if config.precision == "fp16":
        raise ConfigError("precision=fp16 is for one process; on many take bf16: --set precision=bf16")
    sizes = model_arguments(config, latent_channels=4, caption_channels=1)
    clips = [parse_bucket(bucket).frames for bucket in config.data.buckets] or [config.data.frames]
    batch = config.global_batch if config.data.tokens is None else None  # else buckets have batches of their own
    grouping.check(config.model.variant, sizes["num_heads"], min(clips) // config.model.patch_size[0], batch)
    return grouping
