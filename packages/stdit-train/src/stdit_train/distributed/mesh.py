"""The process groups of a run's parallel dimensions."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stdit_train.distributed.dims import ParallelDims
from stdit_train.errors import ConfigError


@dataclass(frozen=True)
class ParallelMesh:
    """The process groups of `dims`.

    Attributes:
        dims: parallel dimensions.
        weights: mesh over which weights are sharded: (shard) or (replicate, shard).
        dp_rank: data-parallel rank of this process, 0..dims.data - 1.
        sequence: group of the processes that share a clip with this one; None without sequence parallelism.
    """

    dims: ParallelDims
    weights: DeviceMesh
    dp_rank: int
    sequence: dist.ProcessGroup | None


def build_mesh(dims: ParallelDims, device: torch.device) -> ParallelMesh:
    """Create the process groups; torch.distributed must be initialized, and all processes must call this.

    Raises:
        ConfigError: another number of processes is running.
    """
    if dist.get_world_size() != dims.world_size:
        raise ConfigError(f"{dims.world_size} processes expected, {dist.get_world_size()} are running")
    if dims.replicate == 1:
        weights = init_device_mesh(device.type, (dims.shard,), mesh_dim_names=("shard",))
    else:
        weights = init_device_mesh(device.type, (dims.replicate, dims.shard), mesh_dim_names=("replicate", "shard"))
    if dims.sequence == 1:
        return ParallelMesh(dims, weights, dist.get_rank(), None)
    clips = init_device_mesh(device.type, (dims.data, dims.sequence), mesh_dim_names=("data", "sequence"))
    return ParallelMesh(dims, weights, clips.get_local_rank("data"), clips.get_group("sequence"))
