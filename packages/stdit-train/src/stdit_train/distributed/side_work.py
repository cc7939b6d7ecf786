"""Side work of a run, such as plots, samples and metrics: its errors are logged, and the run goes on.

Work of one process alone may fail as it likes. Work in which the processes exchange messages is different: one that
left it early would leave the others waiting. So whatever can fail on one process alone (reading a clip, encoding,
writing a file) is a part of its own (`on_every_rank`), after which all processes agree whether it succeeded. Between
the parts only the model runs. An error there ends a run of several processes, since the others cannot be called back.
"""

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

from stdit_train.distributed.world import World

T = TypeVar("T")

log = logging.getLogger(__name__)


class PartFailed(Exception):
    """A part of the side work failed on some process; raised on all of them, with that one's traceback as its text."""


def on_every_rank(world: World, act: Callable[[], T]) -> T:
    """Call a function, which sends no messages, on every process, and return its own result.

    Raises:
        PartFailed: it failed on one of several processes; a single process raises the error itself.
    """
    if world.size == 1:
        return act()
    result, failure, text = None, None, None
    try:
        result = act()
    except Exception as error:
        failure, text = error, f"on process {world.rank}:\n{''.join(traceback.format_exception(error))}"
    found = world.first_result([text])
    if found is not None:
        raise PartFailed(found.rstrip()) from failure
    return result  # type: ignore[return-value]


class SideWork:
    """Carries out the side work of a run.

    A failure is one line on the console and a traceback in run.log. Work that keeps failing is reported at the first,
    second, fourth, eighth, ... failure in a row.

    Args:
        world: processes of the run.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._failures: dict[str, int] = {}

    def alone(self, what: str, step: int, act: Callable[[], T]) -> T | None:
        """Call a function that sends no messages; return None if it fails.

        Args:
            what: name of the work, for the log.
            step: steps done.
            act: does the work.
        """
        try:
            result = act()
        except Exception as error:
            self._report(what, step, error)
            return None
        self._failures.pop(what, None)
        return result

    def together(self, what: str, step: int, act: Callable[[], T]) -> T | None:
        """Call a function that exchanges messages, on every process; return None if a part of it fails (`alone`).

        Raises:
            Exception: it failed outside its parts, in a run of several processes.
        """
        try:
            result = act()
        except PartFailed as error:
            self._report(what, step, error)
            return None
        except Exception as error:
            if self.world.size > 1:
                raise
            self._report(what, step, error)
            return None
        self._failures.pop(what, None)
        return result

    def _report(self, what: str, step: int, error: Exception) -> None:
        count = self._failures[what] = self._failures.get(what, 0) + 1
        if isinstance(error, PartFailed):
            reason = str(error).splitlines()[-1]
            if not self.world.is_main:
                return  # the main process reports it
        else:
            reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        if count & (count - 1) == 0:
            again = f" for the {count}th time in a row" if count > 2 else " again" if count == 2 else ""
            line = "step %d: %s failed%s (%s); the run goes on. Traceback in run.log"
            log.warning(line, step, what, again, reason, exc_info=error)
