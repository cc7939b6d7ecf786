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
from stdit_train.config.schema import TrainConfig
from stdit_train.data.ahead import NextStep
from stdit_train.data.videos import loader_settings
from stdit_train.distributed.failures import PeerFailed, is_connection_lost
from stdit_train.distributed.parallelize import set_gradient_reduction
from stdit_train.distributed.side_work import SideWork
from stdit_train.distributed.step_message import StepReport, StepSummary, exchange
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, Diverged, RunEnded
from stdit_train.garbage import GarbageCollection
from stdit_train.hardware import memory_in_use
from stdit_train.interrupts import Interrupts
from stdit_train.optim.ema import Ema
from stdit_train.optim.optimizers import learning_rate_factor, set_learning_rate
from stdit_train.optim.precision import UNSTABLE, Precision
from stdit_train.outputs import Outputs
from stdit_train.task import Task
from stdit_train.tracking.data_wait import DataWait
from stdit_train.tracking.profiler import Profile
from stdit_train.tracking.run_log import RunLog
from stdit_train.tracking.sessions import Session

log = logging.getLogger(__name__)


class Trainer:
    """Trains the network of a task on a dataset.

    Args:
        config: settings of the run.
        run: folder of the run; it must exist when training begins.
        task: what is trained, on `device`, and what comes of it.
        dataset: training clips.
        validation: clips for the validation loss, None for none.
        device: device of this process.
        callback: called as the run proceeds, on rank 0.
        world: processes of the run, with its mesh. [default: this one]

    Attributes:
        step: optimizer steps done.
        elapsed: seconds of training, over all resumptions.
        skipped: consecutive steps, up to the last one, whose loss or gradient was not finite.
        told: what all processes said of the last step.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        task: Task,
        dataset: ClipDataset,
        validation: ClipDataset | None,
        device: torch.device,
        callback: Callback,
        world: World | None = None,
    ) -> None:
        self.config, self.run, self.task, self.device = config, run, task, device
        self.world = world = world or World()
        self.callback = callback if world.is_main else NullCallback()
        self.model = task.model.train()
        self.ema = Ema(task.averaged, config.optimizer.ema, task.build_average())
        self.optimizers = task.build_optimizers()
        self.precision = Precision(self.model, config.precision, device, task.sharded)
        task.prepare(self.precision.module)
        self.batch_loss = task.build_loss(self.precision, dataset)
        dataset, validation = self.batch_loss.in_memory(dataset), validation and self.batch_loss.in_memory(validation)
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
            prefetch_bytes=config.data.prefetch_bytes,
            rejects=run.rejects_file,
            pin_memory=device.type == "cuda",
            draw=self.batch_loss.draw if config.draw == "philox" else None,
        )
        asynchronous = device.type == "cuda" if config.checkpoint_async is None else config.checkpoint_async
        self.checkpoints = CheckpointManager(run, config.keep_checkpoints, config.keep_every, asynchronous, world)
        self.side_work = SideWork(world)
        self.outputs = Outputs(config, run, self.ema.model, task, self.batch_loss, validation, world, self.side_work)
        self.step, self.elapsed, self.skipped = 0, 0.0, 0
        self.told: StepSummary
        self._session: Session | None = None
        self._position: dict[str, int] | None = None  # of the loader, after the last whole step
        self._stepping = False  # whether the weights are changing
        self._ahead: NextStep | None = None
        self._interrupts = Interrupts()
        self._since, self._waited = time.perf_counter(), 0.0  # begin of the step, and its waiting for data so far

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
        position = self.loader.position
        factor = learning_rate_factor(self.step, self.progress, self.config.optimizer)
        set_learning_rate(self.optimizers, factor)
        terms, losses, timesteps = self._accumulate(batches)
        self.precision.unscale(self.optimizers)
        norm = self.task.clip_gradients(self.config.optimizer.clip)
        numbers = torch.cat([torch.stack([*terms.values(), norm]).float(), losses]).tolist()  # waits for the device
        gradient_norm = numbers[len(terms)]
        told = self._exchange(batches, dict(zip(terms, numbers, strict=False)), timesteps, numbers[len(terms) + 1 :])
        self._stepping = True
        finite = math.isfinite(told.terms["loss"]) and math.isfinite(gradient_norm)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.task.averaged)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.precision.finish_step(finite)
        self.step += 1
        self._position, self._stepping = position, False
        counts = {"repeats": float(told.repeats)} if told.repeats else {}
        if not finite:
            self._skip(batches, told.terms["loss"], gradient_norm)
            return {"skipped": 1.0} | counts
        self.skipped = 0
        self.outputs.bins.add(told.timesteps, told.losses)
        return told.terms | {"gradient_norm": gradient_norm, "lr_factor": factor} | counts

    def _accumulate(self, batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor, list[float]]:
        """Run forward and backward of every micro-batch, without waiting for the device.

        Returns:
            The mean loss terms of this process's samples, and their losses [b], on the device; their timesteps.
        """
        terms: dict[str, Tensor] = {}
        losses, timesteps = [], []
        samples = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            timestep, found = self.batch_loss.loss(batch)
            share = len(batch.indices) / samples
            set_gradient_reduction(self.model, last=batch is batches[-1], once=self.config.reduce_once is not False)
            self.precision.backward(found["loss"].mean() * share)
            for name, term in found.items():
                part = term.detach().mean() * share
                terms[name] = terms[name] + part if name in terms else part
            losses.append(found["loss"].detach())
            timesteps.append(timestep)
        return terms, torch.cat(losses).float(), torch.cat(timesteps).tolist()

    def _exchange(
        self, batches: list[Batch], terms: dict[str, float], timesteps: list[float], losses: list[float]
    ) -> StepSummary:
        """Fetch the next step's batches, if there is to be one, and exchange the message of this step."""
        if self._ahead is not None and self.step + 1 < self.config.steps and not self._interrupts.number:
            self._waited += self._ahead.fetch()
        now = time.perf_counter()
        own = StepReport(
            terms,
            timesteps,
            losses,
            repeats=sum(batch.repeats for batch in batches),
            seconds=now - self._since,
            waited=self._waited,
            memory=memory_in_use(self.device),
            signal=self._interrupts.number or 0,
            lost=self.checkpoints.failed,
            failed=self._ahead is not None and self._ahead.failure is not None,
        )
        self.told = exchange(self.world, own)
        self._since, self._waited = now, 0.0
        return self.told

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
        """Train to the last step, then write a checkpoint, the folder with the result and the plot of the losses.

        A run that is interrupted writes a checkpoint only.

        Raises:
            FolderInUseError: another process trains in the run's folder.
            RunEnded: the disk is full or keeps failing, too many steps were not finite, or a store stopped answering;
                the last checkpoint is whole.
            DataError: the clips cannot be used; a checkpoint is written.
        """
        config, values, begun = self.config, {}, self.step
        with self._context() as (profile, garbage):
            if config.precision == "fp16":
                log.warning(UNSTABLE)
            wait = DataWait(self.loader.dataset, config)
            self.callback.started(self.step, config.steps)
            speed = cache(self.task.speed)
            ahead, signal, failed = self._begin()
            while self.progress < 1.0 and not signal and not failed:
                batches = ahead.batches
                values = self.train_step(batches)
                told, paused = self.told, time.perf_counter()
                self.side_work.alone("profiling", self.step, profile.step)
                self.elapsed += told.seconds
                waited = max(told.waits)
                wait.add(told.seconds, waited)
                samples = len(told.losses)
                values |= speed(samples, self.batch_loss.shape(batches[0])).figures(told.seconds, waited, told.memory)
                if self.world.size > 1:
                    values["data_wait_rank"] = float(told.waits.index(waited))
                self.outputs.interval.add(values, told.seconds)
                self.callback.stepped(self.step, self.progress, values)
                self._write(values, self.progress >= 1.0)
                if told.lost:  # a checkpoint that was being written in the background
                    self._save(last=True)
                garbage.collect(self.step)
                self._since += time.perf_counter() - paused
                signal, failed = told.signal or self._signal_alone(), told.failed
            failure = (ahead.failure or PeerFailed(1)) if failed else None
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
            (number,) = self.world.all_max(self._interrupts.number or 0)  # it may have come during the last step
        return Outcome(self.step, finished, values, int(number) or None, tuple(self.task.prompts))

    @contextlib.contextmanager
    def _context(self) -> Iterator[tuple[Profile, GarbageCollection]]:
        """Open what the loop needs, from the log to the signal handlers; close it and the loader at the end."""
        with contextlib.ExitStack() as stack:
            self.world.broadcast_from_main(lambda: stack.enter_context(lock_folder(self.run.path)))
            stack.enter_context(self.checkpoints.explaining())
            if self.world.is_main:
                stack.enter_context(RunLog(self.run))
                self._session = Session(self.run, self.device, self.world.size, self.world.parallel)
            stack.enter_context(self.outputs.opened(self.step))
            stack.callback(self.loader.close)
            self._interrupts = stack.enter_context(Interrupts())
            stack.enter_context(self._rescuing())

            def trace(write: Callable[[], None]) -> None:
                self.side_work.alone("writing the trace", self.step, write)

            folder = self.run.path / "profile"
            profile = stack.enter_context(Profile(folder, self.config.profile, self.world.rank, trace))
            yield profile, stack.enter_context(GarbageCollection())

    def _begin(self) -> tuple[NextStep, int, bool]:
        """Fetch the first step; return it, the number of a signal, 0 for none, and whether some rank cannot read it."""
        self._since, self._position = time.perf_counter(), self.loader.position
        self._ahead = NextStep(self.loader)
        self._waited = self._ahead.fetch() if self.progress < 1.0 else 0.0
        signal, failed = self.world.all_max(self._interrupts.number or 0, float(self._ahead.failure is not None))
        return self._ahead, int(signal), bool(failed)

    def _signal_alone(self) -> int:
        """Return the number of a signal that has come since the message of the step, 0 for none.

        Of several processes the others do not know of it: it goes with the next message.
        """
        return (self._interrupts.number or 0) if self.world.size == 1 else 0

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

    def _write(self, values: dict[str, float], finished: bool) -> None:
        """Write the outputs and a checkpoint where the step is a multiple of their intervals."""
        config, due = self.config, self.outputs.due(self.step) or finished
        if self.world.is_main and (due or self.step % config.checkpoint_every == 0):
            self.side_work.alone("the check of the run folder", self.step, self._restore_folder)
        if due:
            self.outputs.write(self.step, values, finished)
        if self.step % config.checkpoint_every == 0 and not finished:
            self._save()
            self.outputs.plot(self.step)

    def _restore_folder(self) -> None:
        """Create the run's folder again if it was deleted: a checkpoint without its settings could not be resumed."""
        if not self.run.config_file.exists():
            self.run.write_anew(self.config)
            log.warning("step %d: %s was deleted; created again without its earlier files", self.step, self.run.path)

    # -- results ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the last checkpoint, the folder with the result and the plot of the losses."""
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
