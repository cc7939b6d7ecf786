"""Run by test_torchrun.py, in each process of a run: `stdit`, whose loss fails in a step.

FAIL is "STEP RANKS": the step that fails, counted from 1, and the ranks in which it does, as in "6 01".
"""

import os
from typing import Any

from stdit_cli.main import main
from stdit_train.trainer import Trainer

step_that_fails, ranks = os.environ["FAIL"].split()
accumulate = Trainer._accumulate


def failing(self: Trainer, *arguments: Any) -> Any:
    if self.step + 1 == int(step_that_fails) and str(self.world.rank) in ranks:
        raise ZeroDivisionError("in the loss")
    return accumulate(self, *arguments)


if __name__ == "__main__":
    Trainer._accumulate = failing  # type: ignore[method-assign]
    main()
