"""Run by test_chaos.py, in each process of a run: `stdit` on a disk that fails at random, with its steps recorded.

CHAOS is JSON: "folder" that the faults are confined to, "share" of its operations that fail, "seed", and "out" for the
records: steps-RANK.jsonl, the samples of each step, and faults.jsonl.
"""

import builtins
import errno
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAOS = json.loads(os.environ["CHAOS"])
RANK = os.environ["RANK"]
OUT = Path(CHAOS["out"])
numbers = random.Random(f"{CHAOS['seed']} {RANK}")


def record(name: str, values: object) -> None:
    descriptor = os.open(OUT / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(values) + "\n").encode())
    os.close(descriptor)


def is_concerned(path: object) -> bool:
    if isinstance(path, int):
        path = Path(f"/proc/self/fd/{path}").readlink()
    return isinstance(path, (str, os.PathLike)) and Path.cwd().joinpath(path).is_relative_to(CHAOS["folder"])


def flaky(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def act(path: Any, *arguments: Any, **named: Any) -> Any:
        if is_concerned(path) and numbers.random() < CHAOS["share"]:
            record("faults.jsonl", [RANK, name, str(path), *map(str, arguments)])
            raise OSError(errno.EIO, os.strerror(errno.EIO), path if not isinstance(path, int) else None)
        return real(path, *arguments, **named)

    return act


def record_steps() -> None:
    from stdit_train.checkpoint import manager
    from stdit_train.trainer import Trainer

    manager.PAUSES = (0.05, 0.2)  # type: ignore[assignment]
    step = Trainer.train_step

    def recorded(self: Trainer, batches: list[Any]) -> dict[str, float]:
        values = step(self, batches)
        samples = [[index, batch.epoch, *batch.bucket] for batch in batches for index in batch.indices]
        record(f"steps-{RANK}.jsonl", [self.step, samples, sum(batch.repeats for batch in batches), values["loss"]])
        return values

    Trainer.train_step = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    record("pids.jsonl", os.getpid())
    from stdit_cli.main import main

    record_steps()
    builtins.open = io.open = flaky("open", io.open)  # type: ignore[assignment]
    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, flaky(name, getattr(os, name)))
    main()
