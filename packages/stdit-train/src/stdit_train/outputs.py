"""What a run puts out along the way and at its end: metrics, validation, samples, plot, the folder with the result."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from stdit_data.clip import ClipDataset
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.side_work import SideWork
from stdit_train.distributed.world import World
from stdit_train.report.plots import plot_losses
from stdit_train.task import Loss, Task
from stdit_train.tracking.interval import StepInterval
from stdit_train.tracking.metrics import Metrics, NoMetrics, TimestepBins, open_metrics

log = logging.getLogger(__name__)


class Outputs:
    """Writes the outputs of a run. All but the result's folder are side work, whose errors do not end the run.

    Args:
        config: settings of the run.
        run: folder of the run.
        model: the average weights, which are validated, sampled from and published.
        task: samples, and publishes the result.
        batch_loss: validates.
        validation: clips for it, None for none.
        world: processes of the run.
        side_work: carries them out.

    Attributes:
        bins: losses by timestep since the last row of metrics.
        interval: values of the steps since then.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        model: nn.Module,
        task: Task,
        batch_loss: Loss,
        validation: ClipDataset | None,
        world: World,
        side_work: SideWork,
    ) -> None:
        self.config, self.run, self.model, self.task = config, run, model, task
        self.batch_loss, self.validation = batch_loss, validation
        self.world, self.side_work = world, side_work
        self.bins, self.interval = TimestepBins(config.timestep_bins), StepInterval()
        self._metrics: Metrics | NoMetrics = NoMetrics()

    # -- metrics ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Open the metrics of a run after so many steps, and close them at the end."""
        self._metrics = open_metrics(self.run, self.config, step) if self.world.is_main else NoMetrics()
        try:
            yield
        finally:
            self.side_work.alone("closing the metrics", step, self._metrics.close)

    def state_dict(self) -> dict[str, Any]:
        """Return `bins` and `interval`, as JSON values."""
        return {"bins": self.bins.state_dict(), "interval": self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.bins.load_state_dict(state["bins"])
        if "interval" in state:  # not in checkpoints of stdit-train before 0.2
            self.interval.load_state_dict(state["interval"])

    # -- along the way ---------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether something is to be written after a step."""
        config = self.config
        return any(step % every == 0 for every in (config.log_every, config.validate_every, config.sample_every))

    def write(self, step: int, values: dict[str, float], finished: bool) -> None:
        """Write metrics, validate and sample where the step is a multiple of their intervals, or the last one.

        The metrics of a validation are added to `values`.
        """
        config, side_work = self.config, self.side_work
        if step % config.log_every == 0 or finished:
            row = self.interval.take() | self.bins.take()
            side_work.alone("writing metrics", step, lambda: self._metrics.write(step, row))
        if self.validation is not None and (step % config.validate_every == 0 or finished):
            found = side_work.together("validation", step, self.validate)
            if found is not None:
                values |= found
                side_work.alone("writing metrics", step, lambda: self._metrics.write(step, found))
                told = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
                log.info("step %d: %s", step, ", ".join(told))
        if step % config.sample_every == 0 or finished:
            side_work.together("sampling", step, lambda: self._sample(step))

    def validate(self) -> dict[str, float]:
        """Return the metrics of the average weights on fixed clips."""
        assert self.validation is not None
        return self.batch_loss.validate(self.model, self.validation)

    def _sample(self, step: int) -> None:
        folder = self.run.samples if self.world.is_main else None  # all ranks sample, rank 0 writes
        sheet = self.task.sample(self.model, folder, step, self.batch_loss.precision.autocast)
        log.info("step %d: samples in %s", step, sheet)

    def plot(self, step: int) -> None:
        """Plot the losses so far."""
        if self.world.is_main:
            files = self.run.metrics_file, self.run.loss_plot
            self.side_work.alone("plotting", step, lambda: plot_losses(*files, self.task.title))

    # -- at the end ------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the folder with the result."""
        self.task.publish(self.model, self.run)
