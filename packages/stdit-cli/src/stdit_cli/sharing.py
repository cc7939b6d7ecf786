"""Several processes at one command, as torchrun starts them: each makes its share of the videos."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

PATIENCE = timedelta(days=7)  # of those that are done first


class Share(NamedTuple):
    """This process among those of the command."""

    rank: int
    world: int
    local_rank: int

    def of(self, items: list[Any]) -> list[Any]:
        """Every world-th item, so that shares differ by one at most."""
        return items[self.rank :: self.world]

    def choose_device(self) -> None:
        """On a machine of several GPUs, the one of this process."""
        import torch

        if self.world > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)


def find_share() -> Share:
    """From the environment that torchrun sets; alone without it."""
    values = [
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    ]
    return Share(*values)


def gather(share: Share, mine: list[Any]) -> list[Any] | None:
    """Everybody's items on rank 0, in the order in which `Share.of` dealt them out; None on the others."""
    if share.world == 1:
        return mine
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    lists: list[Any] | None = [None] * share.world if share.rank == 0 else None
    dist.gather_object(mine, lists)
    dist.destroy_process_group()
    return None if lists is None else in_turns(lists)


def in_turns(parts: list[list[Any]]) -> list[Any]:
    """The first of each, the second of each, and so on."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
