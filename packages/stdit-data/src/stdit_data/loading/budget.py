"""Limit the bytes of the clips that are read ahead."""

from __future__ import annotations

from threading import Condition

from stdit_data.buckets import Bucket


class ByteBudget:
    """Limits the bytes of the steps that have been read, or are being read, and are not handed out yet.

    A clip counts as the largest one so far of its bucket. The step to hand out next is read whatever its size, and
    no later one while the size of its bucket is unknown.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sizes: dict[Bucket, int] = {}  # bytes of a clip
        self._steps: dict[int, tuple[Bucket, int]] = {}  # bucket and number of slots of each step
        self._next = 0  # number of the step to hand out next
        self._closed = False  # whether nothing more is to be read
        self._changed = Condition()

    def admit(self, step: int, bucket: Bucket) -> bool:
        """Wait until a slot of a step may be read; return False if it is not needed any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or step == self._next or self._fits(bucket))
            self._steps[step] = (bucket, self._steps.get(step, (bucket, 0))[1] + 1)
            return not self._closed

    def measure(self, bucket: Bucket, nbytes: int) -> None:
        """Take the size of a clip into account."""
        with self._changed:
            self._sizes[bucket] = max(nbytes, self._sizes.get(bucket, 0))
            self._changed.notify_all()

    def hand_out(self) -> None:
        """Count the next step as handed out."""
        with self._changed:
            self._steps.pop(self._next)
            self._next += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let whoever waits go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, bucket: Bucket) -> bool:
        held = sum(count * self._sizes.get(held_bucket, 0) for held_bucket, count in self._steps.values())
        return bucket in self._sizes and held + self._sizes[bucket] <= self.limit
