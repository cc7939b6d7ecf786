"""The training step and the training loop of a run, the same in one process and in many."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_data.errors import DataError, StoreError
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
from stdit_train.checkpoint.lock import lock_folder
from stdit_train.checkpoint.manager import CheckpointManager, is_full
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.checkpoint.verify import Checkpoint, CheckpointError
from stdit_train.components.load import Components
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import cached_in_memory
from stdit_train.data.videos import loader_settings
from stdit_train.distributed.failures import PeerFailed, is_connection_lost
from stdit_train.distributed.parallelize import (
    apply_ac,
    apply_compile,
    build_ema,
    clip_shapes,
    set_gradient_reduction,
)
from stdit_train.distributed.side_work import SideWork
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, Diverged, RunEnded
from stdit_train.hardware import memory_in_use
from stdit_train.interrupts import Interrupts
from stdit_train.loss.batch import BatchLoss
from stdit_train.optim.ema import Ema
from stdit_train.optim.optimizers import build_optimizers, clip_gradients, learning_rate_factor, set_learning_rate
from stdit_train.optim.precision import UNSTABLE, Precision
from stdit_train.outputs import Outputs
from stdit_train.tracking.data_wait import DataWait
from stdit_train.tracking.profiler import Profile
from stdit_train.tracking.run_log import RunLog
from stdit_train.tracking.sessions import Session
from stdit_train.tracking.throughput import Speed

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model on a dataset.

    Args:
        config: settings of the run.
        run: folder of the run; it must exist when training begins.
        model: float32 model on `device`, sharded where `world` has a mesh (see `build_model`).
        components: VAE and text encoder, on `device`.
        dataset: training clips.
        validation: clips for the validation loss, None for none.
        prompts: prompts of the samples along the way.
        device: device of this process.
        callback: called as the run proceeds, on rank 0.
        world: processes of the run, with its mesh. [default: this one]

    Attributes:
        step: optimizer steps done.
        elapsed: seconds of training, over all resumptions.
        skipped: consecutive steps, up to the last one, whose loss or gradient was not finite.
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
        callback: Callback,
        world: World | None = None,
    ) -> None:
        self.config, self.run, self.components, self.device, self.prompts = config, run, components, device, prompts
        self.world = world = world or World()
        self.callback = callback if world.is_main else NullCallback()
        self.model = model.train()
        self.ema = Ema(model, config.optimizer.ema, build_ema(model, world))
        self.optimizers = build_optimizers(model, config.optimizer)
        self.precision = Precision(model, config.precision, device, world.sharded)
        if not world.sharded:  # else `build_model` has done it
            apply_ac(self.precision.module, config.activation_checkpointing)
            if config.compile:
                apply_compile(self.precision.module, clip_shapes(config))
        encoded = getattr(dataset, "moments", False) or config.data.cache_latents
        self.batch_loss = BatchLoss(config, components, self.precision, device, encoded, world)
        if encoded:
            dataset = cached_in_memory(dataset, components.vae, device)
            validation = validation and cached_in_memory(validation, components.vae, device)
        # Clips that are encoded on first use share the device with the step, so reading ahead would halve its speed.
        lazy = isinstance(dataset, InMemoryLatents)
        self.loader = ClipLoader(
            dataset,
            **loader_settings(config),
            seed=config.seed,
            rank=world.dp_rank,
            world_size=world.dp_size,
            workers=0 if lazy else config.data.workers,
            prefetch=0 if lazy else 2,
            rejects=run.rejects_file,
            pin_memory=device.type == "cuda",
        )
        asynchronous = device.type == "cuda" if config.checkpoint_async is None else config.checkpoint_async
        self.checkpoints = CheckpointManager(run, config.keep_checkpoints, config.keep_every, asynchronous, world)
        self.side_work = SideWork(world)
        model = self.ema.model
        self.outputs = Outputs(
            config, run, model, components, self.batch_loss, validation, prompts, world, self.side_work
        )
        self.step, self.elapsed, self.skipped = 0, 0.0, 0
        self._session: Session | None = None
        self._position: dict[str, int] | None = None  # of the loader, after the last whole step
        self._stepping = False  # whether the weights are changing

    # -- start -----------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            ConfigError: the checkpoint is of another run, model or optimizer, or the data set is another by now.
        """
        if checkpoint.state["run"] != self.run.id:
            raise CheckpointError(f"checkpoint {checkpoint.path} is of another run than {self.run.path}")
        rest = load_checkpoint(checkpoint, self.model, self.ema.model, self.optimizers)
        state = checkpoint.state
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.skipped = state["skipped"] % self.config.max_skipped  # a run that ended because of them may try again
        self.outputs.load_state_dict(state)
        self.precision.load_state_dict(state["precision"])
        try:
            self.loader.load_state_dict(state["loader"])
        except DataError as error:
            option = f"--init {self.run.path}"
            raise ConfigError(f"{error}: {option} starts one from this run's weights, with the data anew") from error
        restore_generators(rest)

    def init_from_run(self, previous: RunFolder) -> None:
        """Load the weights of another run's newest checkpoint, and their average.

        Raises:
            RunEnded: it has no checkpoint.
        """
        checkpoint = self.world.broadcast_from_main(previous.latest_checkpoint)
        if checkpoint is None:
            raise RunEnded(f"{previous.path} has no checkpoint to start from: resume that run first")
        load_weights(checkpoint, self.model, self.ema.model)
        self.precision.finish_loading()

    # -- one step --------------------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """Take one optimizer step over micro-batches; return its mean loss terms, gradient norm and lr factor.

        A step whose loss or gradient norm is not finite is skipped: weights and optimizers keep their values, and
        {"skipped": 1.0} is returned. "repeats", if there were any, counts samples that stood in for unreadable ones.
        """
        factor = learning_rate_factor(self.step, self.progress, self.config.optimizer)
        set_learning_rate(self.optimizers, factor)
        terms, timesteps = self._accumulate(batches)
        repeats = float(sum(batch.repeats for batch in batches))
        terms = self.world.all_mean({**terms, "repeats": repeats})
        count = round(terms.pop("repeats") * self.world.dp_size)
        counts = {"repeats": float(count)} if count else {}
        self.precision.unscale(self.optimizers)
        norm = clip_gradients(self.model, self.config.optimizer.clip)
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        self._stepping = True
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.model)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.precision.finish_step(finite)
        self.step += 1
        self._position, self._stepping = self.loader.position, False
        if not finite:
            self._skip(batches, terms["loss"], norm)
            return {"skipped": 1.0} | counts
        self.skipped = 0
        self.outputs.bins.add(*timesteps)
        return terms | {"gradient_norm": norm, "lr_factor": factor} | counts

    def _accumulate(self, batches: list[Batch]) -> tuple[dict[str, float], Tensor]:
        """Run forward and backward of every micro-batch.

        Returns:
            The mean loss terms of this process's samples, and timesteps and losses of all samples, [2, b].
        """
        totals: dict[str, Tensor] = {}
        losses = []
        samples = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            timestep, terms = self.batch_loss.loss(batch)
            share = len(batch.indices) / samples
            set_gradient_reduction(self.model, last=batch is batches[-1], once=self.config.reduce_once is not False)
            self.precision.backward(terms["loss"].mean() * share)
            for name, term in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + term.detach().mean() * share
            losses.append(torch.stack([timestep, terms["loss"].detach().cpu()]))
        timesteps = self.world.all_gather(torch.cat(losses, dim=1))
        return {name: total.item() for name, total in totals.items()}, timesteps

    def _skip(self, batches: list[Batch], loss: float, norm: float) -> None:
        """Report why a step was skipped, and end the run after `max_skipped` of them in a row."""
        if math.isfinite(loss) and self.precision.loss_scale > 1.0:  # expected; the scale adapts
            log.info("step %d: gradients overflowed, loss scale now %g", self.step, self.precision.loss_scale)
            return
        self.skipped += 1
        cause = self.batch_loss.find_nonfinite(batches) or "nothing, when the step was run again"
        line = f"step {self.step} skipped: loss {loss:g}, gradient norm {norm:g}; first not finite: {cause}"
        if self.world.is_main:
            log.warning(line)
        if self.skipped >= self.config.max_skipped:
            self._save(last=True)
            raise Diverged(
                f"{self.skipped} steps in a row were not finite, the last: {line}. The weights before them are saved: "
                "resume with --resume and a lower --set optimizer.lr=..., or --set precision=fp32"
            )

    # -- the loop --------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1: of its steps or of its minutes, whichever is larger."""
        by_steps = self.step / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return min(1.0, max(by_steps, self.elapsed / (60.0 * self.config.minutes)))

    def train(self) -> Outcome:
        """Train to the last step, then write a checkpoint, the pipeline folder and the plot of the losses.

        A run that is interrupted writes a checkpoint only.

        Raises:
            FolderInUseError: another process trains in the run's folder.
            RunEnded: the disk is full or keeps failing, too many steps were not finite, or a store stopped answering;
                the last checkpoint is whole.
            DataError: the clips cannot be used; a checkpoint is written.
        """
        config, values, begun, failure = self.config, {}, self.step, None
        with self._context() as (interrupts, profile):
            if config.precision == "fp16":
                log.warning(UNSTABLE)
            wait = DataWait(self.loader.dataset, config)
            self.callback.started(self.step, config.steps)
            speed, steps = cache(self._speed), iter(self.loader)
            signal, _ = self._events(interrupts)
            while self.progress < 1.0 and not signal:
                started = time.perf_counter()
                batches, waited, failure = self._fetch(steps)
                if failure is not None:
                    signal, _ = self._events(interrupts)
                    break
                values = self.train_step(batches)
                self.side_work.alone("profiling", self.step, profile.step)
                seconds, memory, *waits = self._slowest(time.perf_counter() - started, waited)
                self.elapsed += seconds
                wait.add(seconds, max(waits))
                samples = sum(len(batch.indices) for batch in batches) * self.world.dp_size
                values |= speed(samples, self.batch_loss.shape(batches[0])).figures(seconds, max(waits), memory)
                if self.world.size > 1:
                    values["data_wait_rank"] = float(waits.index(max(waits)))
                self.outputs.interval.add(values, seconds)
                self.callback.stepped(self.step, self.progress, values)
                self._write(values, self.progress >= 1.0)
                signal, lost = self._events(interrupts)
                if lost:  # a checkpoint that was being written in the background
                    self._save(last=True)
            self.loader.close()
            if failure is not None and not signal:
                self._end(failure, begun)
            finished = self.progress >= 1.0
            if finished:
                self.finish()
            else:
                self._save(last=True)
            if finished and self.world.is_main:
                self.run.update_metadata(finished_at_step=self.step)
        return Outcome(self.step, finished, values, signal or None, tuple(self.prompts))

    @contextlib.contextmanager
    def _context(self) -> Iterator[tuple[Interrupts, Profile]]:
        """Open the log, metrics, profiler and signal handlers of the loop, and close them and the loader."""
        with contextlib.ExitStack() as stack:
            self.world.broadcast_from_main(lambda: stack.enter_context(lock_folder(self.run.path)))
            stack.enter_context(self.checkpoints.explaining())
            if self.world.is_main:
                stack.enter_context(RunLog(self.run))
                self._session = Session(self.run, self.device, self.world.size, self.world.parallel)
            stack.enter_context(self.outputs.opened(self.step))
            stack.callback(self.loader.close)
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(self._rescuing())

            def trace(write: Callable[[], None]) -> None:
                self.side_work.alone("writing the trace", self.step, write)

            folder = self.run.path / "profile"
            yield interrupts, stack.enter_context(Profile(folder, self.config.profile, self.world.rank, trace))

    def _fetch(self, steps: Iterator[list[Batch]]) -> tuple[list[Batch], float, DataError | PeerFailed | None]:
        """Return the next step's batches and the seconds spent waiting for them, or why they cannot be read.

        They can be read on all ranks or on none.
        """
        started = time.perf_counter()
        batches: list[Batch] = []
        failure: DataError | PeerFailed | None = None
        try:
            batches = next(steps)
        except DataError as error:
            failure = error
        waited = time.perf_counter() - started
        if self.world.all_max(float(failure is not None)) == (0.0,):
            return batches, waited, None
        if failure is None:
            self.loader.step_back()
        return [], waited, failure or PeerFailed(1)

    def _end(self, failure: DataError | PeerFailed, begun: int) -> NoReturn:
        """Save what has been trained since step `begun`, and end the run for want of data."""
        if self.step == begun:
            raise failure
        self._save(last=True)
        if isinstance(failure, StoreError):
            raise RunEnded(
                f"{failure}. The run is saved at step {self.step}: resume with stdit train --resume {self.run.path}"
            ) from failure
        raise failure

    def _slowest(self, seconds: float, waited: float) -> tuple[float, ...]:
        """Return the largest duration of the step, the largest memory in use, and each rank's wait for data."""
        waits = [0.0] * self.world.size
        waits[self.world.rank] = waited
        return self.world.all_max(seconds, float(memory_in_use(self.device)), *waits)

    @contextlib.contextmanager
    def _rescuing(self) -> Iterator[None]:
        """Save a last checkpoint before an error ends the run, if every process gets here, with whole weights."""
        try:
            yield
        except (Exception, PeerFailed) as error:
            if is_connection_lost(error) or self.step == 0 or not self.world.all_arrive():
                raise
            saved = isinstance(error, RunEnded) or is_full(error)  # the former have saved, or could not
            (useless,) = self.world.all_max(float(saved or self._stepping))
            if not useless:
                try:
                    self._save(last=True)
                    log.error("an error ends the run after step %d, which is saved", self.step)
                except (Exception, PeerFailed):
                    log.exception("the last checkpoint could not be written either")
            raise

    def _events(self, interrupts: Interrupts) -> tuple[int, bool]:
        """Return the number of the signal that some process received, 0 for none, and whether a checkpoint was lost."""
        signal, lost = self.world.all_max(interrupts.number or 0, float(self.checkpoints.failed))
        return int(signal), bool(lost)

    def _write(self, values: dict[str, float], finished: bool) -> None:
        """Write the outputs and a checkpoint where the step is a multiple of their intervals."""
        if self.world.is_main:
            self.side_work.alone("the check of the run folder", self.step, self._restore_folder)
        self.outputs.write(self.step, values, finished)
        if self.step % self.config.checkpoint_every == 0 and not finished:
            self._save()
            self.outputs.plot(self.step)

    def _restore_folder(self) -> None:
        """Create the run's folder again if it was deleted: a checkpoint without its settings could not be resumed."""
        if not self.run.config_file.exists():
            self.run.write_anew(self.config)
            log.warning("step %d: %s was deleted; created again without its earlier files", self.step, self.run.path)

    # -- results ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the last checkpoint, the pipeline folder and the plot of the losses."""
        self._save(last=True)
        self.outputs.publish()
        self.outputs.plot(self.step)

    def _save(self, last: bool = False) -> None:
        tensors = named_tensors(self.model, self.ema.model, self.optimizers) | generators_state()
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "skipped": self.skipped,
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            **self.outputs.state_dict(),
            "precision": self.precision.state_dict(),
            "loader": self.loader.state_dict() | (self._position or {}),  # it may be a step ahead after an error
        }
        self.checkpoints.save(self.step, tensors, state, last=last)
        if self._session is not None:
            self.side_work.alone("recording the session", self.step, self._session.save)

    def _speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Return the speed meter of steps with so many samples of latents [C, T, H, W]."""
        config, model = self.config, self.model.config
        tokens = math.prod(n // p for n, p in zip(shape[1:], model.patch_size, strict=True))
        own_flops = flops.train_flops(model, (samples, *shape)) // self.world.size
        return Speed(samples, tokens, own_flops, config.precision, self.device)
