"""The one message of a training step: what each process measured, and what it has to tell the others."""

from dataclasses import dataclass

from stdit_train.distributed.world import World


@dataclass(frozen=True)
class StepReport:
    """Numbers of a step on one process.

    Attributes:
        terms: mean loss terms of its samples.
        timesteps, losses: of each of its samples.
        repeats: samples among them that stood in for unreadable ones.
        seconds: duration of the step.
        waited: seconds of it spent waiting for data.
        memory: bytes in use.
        signal: number of the signal that it received, 0 for none.
        lost: whether a checkpoint that was being written in the background is lost.
        failed: whether its data for the next step cannot be read.
    """

    terms: dict[str, float]
    timesteps: list[float]
    losses: list[float]
    repeats: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    memory: int = 0
    signal: int = 0
    lost: bool = False
    failed: bool = False


@dataclass(frozen=True)
class StepSummary:
    """Numbers of a step over all processes: those of `StepReport`, with the means of terms and all samples.

    Attributes:
        terms: means over all processes.
        timesteps, losses: of all samples.
        repeats: sum over the processes that have clips of their own.
        seconds, memory: the largest of any process.
        waits: seconds that each process waited for data, by rank.
        signal: number of a signal that some process received, 0 for none.
        lost, failed: whether it is so on some process.
    """

    terms: dict[str, float]
    timesteps: list[float]
    losses: list[float]
    repeats: int
    seconds: float
    memory: float
    waits: list[float]
    signal: int
    lost: bool
    failed: bool


def exchange(world: World, own: StepReport) -> StepSummary:
    """Send this process's report of a step to the others, and summarise theirs; one message.

    Args:
        world: processes of the run; each must call this with the same terms and the same number of samples.
        own: report of this process.
    """
    counts = (own.repeats, own.seconds, own.waited, own.memory, own.signal, own.lost, own.failed)
    rows = world.gather_numbers([*counts, *own.terms.values(), *own.timesteps, *own.losses])
    (repeats, seconds, waits, memory, signals, lost, failed), rest = _columns(rows, len(counts))
    own_clips = slice(None, None, world.size // world.dp_size)  # one of each group that shares clips
    terms = {name: sum(row[i] for row in rest) / world.size for i, name in enumerate(own.terms)}
    samples = [row[len(terms) :] for row in rest[own_clips]]
    half = len(own.losses)
    return StepSummary(
        terms=terms,
        timesteps=[timestep for row in samples for timestep in row[:half]],
        losses=[loss for row in samples for loss in row[half:]],
        repeats=round(sum(repeats[own_clips])),
        seconds=max(seconds),
        memory=max(memory),
        waits=waits,
        signal=round(max(signals)),
        lost=any(lost),
        failed=any(failed),
    )


def _columns(rows: list[list[float]], count: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return the first columns of rows of numbers, and the rows without them."""
    return [list(column) for column in zip(*(row[:count] for row in rows), strict=True)], [row[count:] for row in rows]
