"""One training run: set-up, step, loop. Whether on one process or on many, `World` knows."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_data.latents.memory import InMemoryLatents
from stdit_data.loading.loader import Batch, ClipLoader
from stdit_model import STDiT, flops
from stdit_train.callbacks import Callback, NullCallback, Outcome
from stdit_train.checkpoint.format import (
    generators_state,
    load_checkpoint,
    load_weights,
    named_tensors,
    restore_generators,
)
from stdit_train.checkpoint.manager import CheckpointManager
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import cached_in_memory
from stdit_train.data.videos import loader_settings
from stdit_train.distributed.parallelize import apply_ac, apply_compile, build_ema, full_model
from stdit_train.distributed.world import World
from stdit_train.errors import Diverged, RunEnded
from stdit_train.interrupts import Interrupts
from stdit_train.loss.batch import BatchLoss
from stdit_train.optim.ema import Ema
from stdit_train.optim.optimizers import build_optimizers, clip_gradients, learning_rate_factor, set_learning_rate
from stdit_train.optim.precision import UNSTABLE, Precision
from stdit_train.pipeline.save import draw_samples, save_pipeline
from stdit_train.report.plots import plot_losses
from stdit_train.tracking.metrics import Metrics, NoMetrics, TimestepBins, open_metrics
from stdit_train.tracking.profiler import Profile
from stdit_train.tracking.throughput import Speed


class Trainer:
    """Trains `model` on `dataset`.

    Args:
        config: the run's settings.
        run: its folder, created.
        model: on `device`, float32, sharded where `world` has a mesh (`build_model`).
        components: VAE and text encoder, on `device`.
        dataset: clips.
        validation: clips for the validation loss, None for none.
        prompts: what is sampled along the way.
        device: where all of it lives.
        watcher: told what happens, on the first process.
        world: Processes of the run, with its mesh. [default: this one]
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        model: STDiT,
        components: Components,
        dataset: ClipDataset,
        validation: ClipDataset | None,
        prompts: list[str],
        device: torch.device,
        watcher: Callback,
        world: World | None = None,
    ) -> None:
        self.config, self.run, self.components, self.device = config, run, components, device
        self.world = world = world or World()
        self.prompts, self.watcher = prompts, watcher if world.is_main else NullCallback()
        self.model = model.train()
        self.ema = Ema(model, config.optimizer.ema, build_ema(model, world))
        self.optimizers = build_optimizers(model, config.optimizer)
        self.precision = Precision(model, config.precision, device, world.sharded)
        if not world.sharded:  # else `build_model` has done it
            apply_ac(self.precision.module, config.activation_checkpointing)
            if config.compile:
                apply_compile(self.precision.module)
        encoded = getattr(dataset, "moments", False) or config.data.cache_latents
        self.scorer = BatchLoss(config, components, self.precision, device, encoded, world)
        if encoded:
            size = self.scorer.latent_shape[1:]
            dataset = cached_in_memory(dataset, components.vae, device, size)
            validation = validation and cached_in_memory(validation, components.vae, device, size)
        self.validation = validation
        # Clips that are encoded when they are asked for share the device with the step: threads that read ahead would
        # only take turns with it, on a CPU at half the speed.
        lazily = isinstance(dataset, InMemoryLatents)
        self.loader = ClipLoader(
            dataset,
            **loader_settings(config),
            seed=config.seed,
            rank=world.dp_rank,
            world_size=world.dp_size,
            workers=0 if lazily else config.data.workers,
            prefetch=0 if lazily else 2,
            rejects=run.rejects_file,
            pin_memory=device.type == "cuda",
        )
        asynchronous = device.type == "cuda" if config.checkpoint_async is None else config.checkpoint_async
        self.saver = CheckpointManager(run, config.keep_checkpoints, config.keep_every, asynchronous, world)
        self.bins = TimestepBins(config.timestep_bins)
        self.step = 0
        self.elapsed = 0.0  # seconds of training, over all resumptions
        self.skipped = 0  # steps in a row that were not finite

    # -- set-up ----------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this run."""
        parts = self.model, self.ema.model, self.optimizers
        state, rest = load_checkpoint(checkpoint, self.run.id, *parts, self.world.broadcast_from_main)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.skipped = state["skipped"] % self.config.max_skipped  # a run that ended for them gets another try
        self.bins.load_state_dict(state["bins"])
        self.precision.load_state_dict(state["precision"])
        self.loader.load_state_dict(state["loader"])
        restore_generators(rest)

    def init_from_run(self, previous: RunFolder) -> None:
        """Start with the weights, and their average, that another run ended with."""
        checkpoint = self.world.broadcast_from_main(lambda: previous.latest_checkpoint(self.watcher.said))
        if checkpoint is None:
            raise RunEnded(f"{previous.path} has no checkpoint to start from: resume that run first")
        load_weights(checkpoint, previous.id, self.model, self.ema.model)
        self.precision.finish_loading()

    # -- one step --------------------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimiser step over a list of micro-batches; returns the mean loss terms and the gradient norm.

        A step whose loss or gradient is not finite changes nothing but `skipped`, and has no loss to return.
        """
        factor = learning_rate_factor(self.step, self.progress, self.config.optimizer)
        set_learning_rate(self.optimizers, factor)
        terms = self.world.all_mean(self._accumulate(batches))
        self.precision.unscale(self.optimizers)
        norm = clip_gradients(self.model, self.config.optimizer.clip)
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.model)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.precision.finish_step(finite)
        self.step += 1
        if not finite:
            return self._skip(batches, terms["loss"], norm)
        self.skipped = 0
        return terms | {"gradient_norm": norm, "lr_factor": factor}

    def _accumulate(self, batches: list[Batch]) -> dict[str, float]:
        """Forward and backward of every micro-batch; mean loss terms of this process's samples."""
        totals: dict[str, Tensor] = {}
        scores = []
        samples = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            timestep, terms = self.scorer.loss(batch)
            share = len(batch.indices) / samples
            self.precision.backward(terms["loss"].mean() * share)
            for name, term in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + term.detach().mean() * share
            scores.append(torch.stack([timestep, terms["loss"].detach().cpu()]))
        self.bins.add(*self.world.all_gather(torch.cat(scores, dim=1)))
        return {name: total.item() for name, total in totals.items()}

    # -- what is not finite ----------------------------------------------------------------------------------------

    def _skip(self, batches: list[Batch], loss: float, norm: float) -> dict[str, float]:
        """Say what went wrong in a step that was not taken, and end the run when that keeps happening."""
        if math.isfinite(loss) and self.precision.loss_scale > 1.0:  # what the loss scale is there for
            self.watcher.said(f"step {self.step}: gradients overflowed, loss scale now {self.precision.loss_scale:g}")
            return {"skipped": 1.0}
        self.skipped += 1
        cause = self.scorer.find_nonfinite(batches) or "nothing, when the step was run again"
        line = f"step {self.step} skipped: loss {loss:g}, gradient norm {norm:g}; first not finite: {cause}"
        self.watcher.said(line)
        if self.skipped >= self.config.max_skipped:
            self._save(last=True)
            raise Diverged(
                f"{self.skipped} steps in a row were not finite, the last: {line}. The weights before them are saved; "
                "go on with --resume and a lower --set optimizer.lr=..., or --set precision=fp32"
            )
        return {"skipped": 1.0}

    # -- the loop --------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1: by steps, or by time where there is a budget and it runs out first."""
        by_steps = self.step / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, self.elapsed / (60.0 * self.config.minutes))

    def train(self) -> Outcome:
        """Train to the end, or until interrupted; either way a checkpoint and a pipeline folder are left behind.

        Raises:
            RunEnded: it can't go on (a full disk, too many steps that are not finite); the last checkpoint is whole.
        """
        config, values = self.config, {}
        if config.precision == "fp16":
            self.watcher.said(UNSTABLE)
        profile = Profile(self.run.path / "profile", config.profile, self.world.rank)
        with self.saver.explaining(), self._metrics() as metrics, Interrupts(self.watcher.said) as interrupts, profile:
            self.watcher.started(self.step, config.steps)
            speed, steps = cache(self._speed), iter(self.loader)
            signal = self._signal(interrupts)
            while self.progress < 1.0 and not signal:
                started = time.perf_counter()
                batches = next(steps)
                waited = time.perf_counter() - started
                values = self.train_step(batches)
                profile.step()
                (seconds,) = self.world.all_max(time.perf_counter() - started)
                self.elapsed += seconds
                samples = sum(len(batch.indices) for batch in batches) * self.world.dp_size
                values |= speed(samples, self.scorer.shape(batches[0])).figures(seconds, waited)
                self.watcher.stepped(self.step, self.progress, values)
                self._now_and_then(metrics, values, finished=self.progress >= 1.0)
                signal = self._signal(interrupts)
            self.loader.close()
            self._save(last=True)
            self._publish()
            self._plot()
            if self.progress >= 1.0 and self.world.is_main:
                self.run.note(finished_at_step=self.step)
        return Outcome(self.step, self.progress >= 1.0, values, signal or None)

    def _signal(self, interrupts: Interrupts) -> int:
        """The number of the signal that some process was sent; 0 for none."""
        return int(self.world.all_max(interrupts.number or 0)[0])

    def _now_and_then(self, metrics: Metrics | NoMetrics, values: dict[str, float], finished: bool) -> None:
        config, step = self.config, self.step
        if self.world.is_main and not self.run.config_file.exists():  # else a checkpoint could not be resumed
            self.run.write_anew(config)
            self.watcher.said(f"step {step}: {self.run.path} was deleted; it is written anew, what was in it is gone")
        if step % config.log_every == 0 or finished:
            metrics.write(step, values | self.bins.take())
        if self.validation is not None and (step % config.validate_every == 0 or finished):
            values["validation_loss"] = self.validate(self.validation)
            metrics.write(step, {"validation_loss": values["validation_loss"]})
            self.watcher.said(f"step {step}: validation loss {values['validation_loss']:.4f}")
        if step % config.sample_every == 0 or finished:
            folder = self.run.samples if self.world.is_main else None  # all draw, one writes
            sheet = draw_samples(self.ema.model, self.components, config, self.prompts, folder, step)
            self.watcher.said(f"step {step}: samples in {sheet}")
        if step % config.checkpoint_every == 0 and not finished:
            self._save()
            self._plot()

    def validate(self, dataset: ClipDataset) -> float:
        """Mean loss of the EMA weights over fixed clips, noise and evenly spread timesteps."""
        return self.scorer.validate(self.ema.model, dataset)

    # -- what is left behind ---------------------------------------------------------------------------------------

    def _save(self, last: bool = False) -> None:
        tensors = named_tensors(self.model, self.ema.model, self.optimizers) | generators_state()
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "skipped": self.skipped,
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            "bins": self.bins.state_dict(),
            "precision": self.precision.state_dict(),
            "loader": self.loader.state_dict(),
        }
        self.saver.save(self.step, tensors, state, last=last)

    def _publish(self) -> None:
        """The pipeline folder."""
        average = full_model(self.ema.model, self.world)

        def write() -> None:
            if average is not None:
                save_pipeline(self.run.pipeline, average, self.components, self.config)

        self.world.on_all(write)

    def _plot(self) -> None:
        if self.world.is_main:
            title = f"{self.config.stage}: {self.config.objective.name} loss"
            plot_losses(self.run.metrics_file, self.run.loss_plot, title)

    def _speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Of steps of so many samples with latents [C, T, H, W]."""
        config, model = self.config, self.model.config
        tokens = math.prod(n // p for n, p in zip(shape[1:], model.patch_size, strict=True))
        own_flops = flops.train_flops(model, (samples, *shape)) // self.world.size
        return Speed(samples, tokens, own_flops, config.precision, self.device)

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Metrics | NoMetrics]:
        """The run's metrics, written by one process; the loader is closed with them."""
        metrics = open_metrics(self.run, self.config, self.step) if self.world.is_main else NoMetrics()
        try:
            yield metrics
        finally:
            self.loader.close()
            with contextlib.suppress(OSError):
                metrics.close()
