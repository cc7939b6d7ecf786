"""Collect Python's cyclic garbage at fixed steps, so that no process of a run stops to do so at a time of its own."""

import gc
from typing import Self

EVERY = 50  # steps between two collections, as in torchtitan


class GarbageCollection:
    """A context without automatic collection. What exists at its start is not looked at again until its end."""

    def __enter__(self) -> Self:
        self._automatic = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._automatic:
            gc.enable()

    def collect(self, step: int) -> None:
        """Collect garbage if a step, counted from the start of the run, is a multiple of `EVERY`."""
        if step % EVERY == 0:
            gc.collect()
