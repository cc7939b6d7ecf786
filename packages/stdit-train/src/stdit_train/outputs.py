"""What a run puts out along the way and at its end: metrics, validation loss, samples, plot, pipeline folder."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from stdit_data.clip import ClipDataset
from stdit_model import STDiT
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.parallelize import full_model
from stdit_train.distributed.side_work import SideWork
from stdit_train.distributed.world import World
from stdit_train.loss.batch import BatchLoss
from stdit_train.pipeline.save import draw_samples, save_pipeline
from stdit_train.report.plots import plot_losses
from stdit_train.tracking.interval import StepInterval
from stdit_train.tracking.metrics import Metrics, NoMetrics, TimestepBins, open_metrics

log = logging.getLogger(__name__)


class Outputs:
    """Writes the outputs of a run. All but the pipeline folder are side work, whose errors do not end the run.

    Args:
        config: settings of the run.
        run: folder of the run.
        model: the average weights, which are validated, sampled from and published.
        components: VAE and text encoder.
        batch_loss: computes the validation loss.
        validation: clips for it, None for none.
        prompts: prompts of the samples.
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
        model: STDiT,
        components: Components,
        batch_loss: BatchLoss,
        validation: ClipDataset | None,
        prompts: list[str],
        world: World,
        side_work: SideWork,
    ) -> None:
        self.config, self.run, self.model, self.components = config, run, model, components
        self.batch_loss, self.validation, self.prompts = batch_loss, validation, prompts
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

        A validation loss is added to `values`.
        """
        config, side_work = self.config, self.side_work
        if step % config.log_every == 0 or finished:
            row = self.interval.take() | self.bins.take()
            side_work.alone("writing metrics", step, lambda: self._metrics.write(step, row))
        if self.validation is not None and (step % config.validate_every == 0 or finished):
            loss = side_work.together("validation", step, self.validate)
            if loss is not None:
                values["validation_loss"] = loss
                row = {"validation_loss": loss}
                side_work.alone("writing metrics", step, lambda: self._metrics.write(step, row))
                log.info("step %d: validation loss %.4f", step, loss)
        if step % config.sample_every == 0 or finished:
            side_work.together("sampling", step, lambda: self._sample(step))

    def validate(self) -> float:
        """Return the mean loss of the average weights over fixed clips, noise and timesteps."""
        assert self.validation is not None
        return self.batch_loss.validate(self.model, self.validation)

    def _sample(self, step: int) -> None:
        folder = self.run.samples if self.world.is_main else None  # all ranks sample, rank 0 writes
        parts = self.model, self.components, self.config, self.prompts
        sheet = draw_samples(*parts, folder, step, self.world, self.batch_loss.precision.autocast)
        log.info("step %d: samples in %s", step, sheet)

    def plot(self, step: int) -> None:
        """Plot the losses so far."""
        if self.world.is_main:
            title = f"{self.config.stage}: {self.config.objective.name} loss"
            run = self.run
            self.side_work.alone("plotting", step, lambda: plot_losses(run.metrics_file, run.loss_plot, title))

    # -- at the end ------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the pipeline folder."""
        average = full_model(self.model, self.world)

        def write() -> None:
            if average is not None:
                save_pipeline(self.run.pipeline, average, self.components, self.config)

        self.world.on_all(write)
