"""Check before a run's first step that its processes agree: with other clips or settings they would train in vain."""

import platform
from collections.abc import Mapping

from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError


def check_agreement(world: World, values: Mapping[str, object]) -> None:
    """Check that all processes hold the same values; every process must call this.

    Args:
        world: processes of the run.
        values: what must be equal, by a name for the message; plain values, which are pickled.

    Raises:
        ConfigError: one differs; the message names the first process and the first value that do.
    """
    found = world.gather([(platform.node(), dict(values))])
    world.broadcast_from_main(lambda: _compare([own for (own,) in found or []]))


def _compare(found: list[tuple[str, dict[str, object]]]) -> None:
    (_, expected), *others = found
    for rank, (host, values) in enumerate(others, start=1):
        for name in expected | values:
            theirs, ours = values.get(name), expected.get(name)
            if theirs != ours:
                raise ConfigError(
                    f"process {rank} on {host} differs from process 0 in {name}: {theirs} instead of {ours}; give all "
                    "processes the same settings, code and files, then start again"
                )
