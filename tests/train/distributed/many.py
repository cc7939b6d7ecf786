"""Run by test_distributed.py: `python many.py OUT < RUNS` trains, one run after the other, from wherever each is.

RUNS is JSON, a list of [processes, folder, configuration]. OUT becomes JSON, of each run and each process: the
samples and losses of its steps, by step, and what it was told.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stdit_train.build import open_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import from_dict
from stdit_train.distributed.world import World
from stdit_train.loss import batch, validation

batch.VALIDATION_CLIPS = validation.VALIDATION_CLIPS = 7  # for speed; two processes can't share them evenly


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        self.losses[step] = values.get("loss", float("nan"))


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """This process's part."""
    config, recorder = from_dict(settings), Recorder()
    with World.from_env() as world:
        trainer = open_trainer(config, config, RunFolder(folder), recorder, world=world)
        samples: dict[int, list[int]] = {}
        step = trainer.train_step

        def watched(batches: list[Any]) -> dict[str, float]:
            samples[trainer.step + 1] = [index for batch in batches for index in batch.indices]
            return step(batches)

        trainer.train_step = watched  # type: ignore[method-assign]
        outcome = trainer.train()
    held = sum(p.numel() if not hasattr(p, "to_local") else p.to_local().numel() for p in trainer.model.parameters())
    return {
        "samples": samples,
        "losses": recorder.losses,
        "step": outcome.step,
        "held": held,
        "accumulation": trainer.loader.accumulation,
    }


def work(rank: int, processes: int, folder: str, config: str, out: str) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=processes)
    Path(f"{out}.{rank}").write_text(json.dumps(train(Path(folder), json.loads(config))))


if __name__ == "__main__":
    found = []
    for number, (count, folder, config) in enumerate(json.load(sys.stdin)):
        out = f"{sys.argv[1]}.{number}"
        # forked, so that the libraries are imported once
        torch.multiprocessing.start_processes(
            work, (count, folder, json.dumps(config), out), nprocs=count, start_method="fork"
        )
        found.append([json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(count)])
    Path(sys.argv[1]).write_text(json.dumps(found))
