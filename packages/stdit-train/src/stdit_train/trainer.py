"""One training run in one process: set-up, step, loop.

b samples of a micro-batch, C channels, T frames, H W latent height and width.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_data.loader import Batch, ClipLoader
from stdit_model import STDiT, video_vae
from stdit_train.checkpoint import load_checkpoint, save_checkpoint
from stdit_train.components import Components, TextMemory
from stdit_train.config import TrainConfig
from stdit_train.ema import Ema
from stdit_train.encoded import RememberedLatents
from stdit_train.metrics import Metrics
from stdit_train.objective import training_loss
from stdit_train.optim import build_optimizers, clip_gradients, learning_rate_factor, set_learning_rate
from stdit_train.parallelize import checkpoint_activations
from stdit_train.randomness import draw
from stdit_train.report import plot_losses
from stdit_train.run_folder import RunFolder
from stdit_train.samples import draw_samples, save_pipeline

VALIDATION_CLIPS = 64


class Watcher(Protocol):
    """Who is told how the run goes (the CLI's progress bar)."""

    def started(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps` steps."""

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """A step is done; `progress` is the share of the run, 0..1."""

    def said(self, line: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    finished: bool  # False when it was interrupted
    values: dict[str, float]  # the last metrics


class Trainer:
    """Trains `model` on `dataset`.

    Args:
        config: the run's settings.
        run: its folder, created.
        model: on `device`, float32.
        components: VAE and text encoder, on `device`.
        dataset: clips.
        validation: clips for the validation loss, None for none.
        prompts: what is sampled along the way.
        device: where all of it lives.
        watcher: told what happens.
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
        watcher: Watcher,
    ) -> None:
        self.config, self.run, self.components, self.device = config, run, components, device
        self.prompts, self.watcher = prompts, watcher
        self.model = model.train()
        self.ema = Ema(model, config.optimizer.ema)
        self.optimizers = build_optimizers(model, config.optimizer)
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        self.text = TextMemory(components, config.model.model_max_length)
        self.latent_shape = video_vae.latent_shape(
            components.vae, config.data.frames, config.data.height, config.data.width
        )
        if config.data.remember_latents:
            dataset, validation = self._remember(dataset), validation and self._remember(validation)
        self.validation = validation
        self.loader = ClipLoader(
            dataset,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            seed=config.seed,
            workers=config.data.workers,
            rejects=run.rejects_file,
            pin_memory=device.type == "cuda",
        )
        self.step = 0
        self.elapsed = 0.0  # seconds of training, over all resumptions
        self._stop = False

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _remember(self, dataset: ClipDataset) -> RememberedLatents:
        vae = self.components.vae

        def encode(video: Tensor) -> Tensor:
            return video_vae.encode_moments(vae, video.to(self.device)).cpu()

        return RememberedLatents(dataset, encode, self.latent_shape[1:])

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this run."""
        state = load_checkpoint(checkpoint, self.model, self.ema.model, self.optimizers)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.loader.load_state_dict(state["loader"])

    # -- one step --------------------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimiser step over a list of micro-batches; returns the mean loss terms and the gradient norm."""
        config = self.config
        factor = learning_rate_factor(self.step, self.progress, config.optimizer)
        set_learning_rate(self.optimizers, factor)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            terms = self._loss(self.model, batch, config.seed, config.objective.caption_dropout)
            share = len(batch.indices) / config.global_batch
            (terms["loss"].mean() * share).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, torch.zeros(())) + term.detach().mean().cpu() * share
        norm = clip_gradients(self.model, config.optimizer.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        return {name: total.item() for name, total in totals.items()} | {"gradient_norm": norm, "lr_factor": factor}

    def _loss(self, model: STDiT, batch: Batch, seed: int, dropout: float) -> dict[str, Tensor]:
        draws = draw(seed, batch.epoch, batch.indices, self.latent_shape)
        x0 = self._latents(batch, draws.posterior)
        y, mask = self.text(batch.captions)
        with self._precision():
            return training_loss(
                model,
                self.config.objective,
                x0,
                draws.noise.to(self.device),
                draws.level.to(self.device),
                y.to(self.device),
                mask.to(self.device),
                drop=(draws.drop < dropout).to(self.device) if dropout else None,
            )

    def _latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """A posterior sample of the micro-batch, normalised: [b, C, T, H, W]."""
        vae, video = self.components.vae, batch.video.to(self.device, non_blocking=True)
        moments = video if self.config.data.remember_latents else video_vae.encode_moments(vae, video)
        return video_vae.sample_latents(vae, moments, noise.to(self.device))

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    # -- the loop --------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1: by steps, or by time where there is a budget and it runs out first."""
        by_steps = self.step / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, self.elapsed / (60.0 * self.config.minutes))

    def train(self) -> Outcome:
        """Train to the end, or until interrupted; either way a checkpoint and a pipeline folder are left behind."""
        config = self.config
        metrics = Metrics(self.run.metrics_file, self.run.tensorboard, self.step)
        self.watcher.started(self.step, config.steps)
        values: dict[str, float] = {}
        with self._interruptible():
            steps = iter(self.loader)
            while self.progress < 1.0 and not self._stop:
                started = time.perf_counter()
                values = self.train_step(next(steps))
                self.elapsed += (seconds := time.perf_counter() - started)
                values["samples_per_second"] = config.global_batch / seconds
                self.watcher.stepped(self.step, self.progress, values)
                self._now_and_then(metrics, values, finished=self.progress >= 1.0)
            self.loader.close()
        finished = self.progress >= 1.0
        self._save()
        save_pipeline(self.run.pipeline, self.ema.model, self.components, config)
        plot_losses(self.run.metrics_file, self.run.loss_plot, f"{config.stage}: {config.objective.name} loss")
        metrics.close()
        return Outcome(self.step, finished, values)

    def _now_and_then(self, metrics: Metrics, values: dict[str, float], finished: bool) -> None:
        config, step = self.config, self.step
        if step % config.log_every == 0 or finished:
            metrics.write(step, values)
        if self.validation is not None and (step % config.validate_every == 0 or finished):
            values["validation_loss"] = self.validate(self.validation)
            metrics.write(step, {"validation_loss": values["validation_loss"]})
            self.watcher.said(f"step {step}: validation loss {values['validation_loss']:.4f}")
        if step % config.sample_every == 0 or finished:
            sheet = draw_samples(self.ema.model, self.components, config, self.prompts, self.run.samples, step)
            self.watcher.said(f"step {step}: samples in {sheet}")
        if step % config.checkpoint_every == 0 and not finished:
            self._save()
            plot_losses(self.run.metrics_file, self.run.loss_plot, f"{config.stage}: {config.objective.name} loss")

    @torch.no_grad()
    def validate(self, dataset: ClipDataset) -> float:
        """Mean loss of the EMA weights over fixed clips, noise and evenly spread timesteps."""
        config, losses = self.config, []
        for start in range(0, VALIDATION_CLIPS, config.global_batch):
            indices = list(range(start, min(start + config.global_batch, VALIDATION_CLIPS)))
            clips = [dataset.load(index % len(dataset), seed=0, epoch=0) for index in indices]
            draws = draw(0, 0, indices, self.latent_shape)
            level = (torch.tensor(indices) + 0.5) / VALIDATION_CLIPS
            video = torch.stack([clip.video for clip in clips]).to(self.device)
            moments = video if config.data.remember_latents else video_vae.encode_moments(self.components.vae, video)
            x0 = video_vae.sample_latents(self.components.vae, moments)
            y, mask = self.text([clip.caption for clip in clips])
            with self._precision():
                terms = training_loss(
                    self.ema.model,
                    config.objective,
                    x0,
                    draws.noise.to(self.device),
                    level.to(self.device),
                    y.to(self.device),
                    mask.to(self.device),
                )
            losses.append(terms["loss"])
        return torch.cat(losses).mean().item()

    def _save(self) -> None:
        state = {"elapsed": self.elapsed, "loader": self.loader.state_dict()}
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            self.model,
            self.ema.model,
            self.optimizers,
            state,
            self.config.keep_checkpoints,
        )

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""
        handlers: dict[int, Any] = {}

        def stop(number: int, _frame: object) -> None:
            self._stop = True
            self.watcher.said("stopping after this step; once more to stop at once")
            signal.signal(number, handlers[number])

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            pass
        try:
            yield
        finally:
            for signal_number, handler in handlers.items():
                signal.signal(signal_number, handler)
