"""One training run in one process: set-up, step, loop.

b samples of a micro-batch, C channels, T frames, H W latent height and width.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stdit_data.buckets import parse_bucket
from stdit_data.clip import ClipDataset
from stdit_data.loader import Batch, ClipLoader
from stdit_model import STDiT, flops, video_vae
from stdit_train.checkpoint import load_checkpoint, load_weights, named_tensors
from stdit_train.components import Components, TextMemory
from stdit_train.config import TrainConfig, to_dict
from stdit_train.ema import Ema
from stdit_train.encoded import RememberedLatents
from stdit_train.interrupts import Interrupts
from stdit_train.metrics import Metrics, TimestepBins, wandb_run
from stdit_train.nonfinite import blame
from stdit_train.objective import place_levels, timestep_of, training_loss
from stdit_train.optim import build_optimizers, clip_gradients, learning_rate_factor, set_learning_rate
from stdit_train.parallelize import checkpoint_activations
from stdit_train.precision import UNSTABLE, Precision
from stdit_train.randomness import draw, generators_state, restore_generators
from stdit_train.report import plot_losses
from stdit_train.run_folder import RunFolder
from stdit_train.samples import draw_samples, save_pipeline
from stdit_train.saving import RunEnded, Saver, disk_full, is_full
from stdit_train.speed import Speed
from stdit_train.validation import validation_loss
from stdit_train.videos import loader_settings
from stdit_train.watching import Outcome, Watcher


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
        self.precision = Precision(model, config.precision, device)
        if config.activation_checkpointing:
            checkpoint_activations(self.precision.module)
        self.text = TextMemory(components, config.model.model_max_length)
        self.latent_shape = video_vae.latent_shape(
            components.vae, config.data.frames, config.data.height, config.data.width
        )
        cached = getattr(dataset, "moments", False)
        self.encoded = cached or config.data.remember_latents
        if self.encoded:
            dataset = dataset if cached else self._remember(dataset)
            validation = validation and self._remember(validation)
        for bucket in config.data.buckets:
            video_vae.latent_shape(components.vae, *parse_bucket(bucket))  # refuses sizes that don't fit the VAE
        self.validation = validation
        self.loader = ClipLoader(
            dataset,
            **loader_settings(config),
            seed=config.seed,
            workers=config.data.workers,
            rejects=run.rejects_file,
            pin_memory=device.type == "cuda",
        )
        asynchronous = device.type == "cuda" if config.checkpoint_async is None else config.checkpoint_async
        self.saver = Saver(run, config.keep_checkpoints, config.keep_every, asynchronous)
        self.bins = TimestepBins(config.timestep_bins)
        self.step = 0
        self.elapsed = 0.0  # seconds of training, over all resumptions
        self.skipped = 0  # steps in a row that were not finite

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _remember(self, dataset: ClipDataset) -> RememberedLatents:
        vae = self.components.vae

        def encode(video: Tensor) -> Tensor:
            return video_vae.encode_moments(vae, video.to(self.device)).cpu()

        return RememberedLatents(dataset, encode, self.latent_shape[1:])

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this run."""
        state, rest = load_checkpoint(checkpoint, self.run.id, self.model, self.ema.model, self.optimizers)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.skipped = state["skipped"] % self.config.max_skipped  # a run that ended for them gets another try
        self.bins.load_state_dict(state["bins"])
        self.precision.load_state_dict(state["precision"])
        self.loader.load_state_dict(state["loader"])
        restore_generators(rest)

    def hand_on(self, previous: RunFolder) -> None:
        """Start with the weights, and their average, that another run ended with."""
        checkpoint = previous.latest_checkpoint(self.watcher.said)
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
        terms = self._accumulate(batches)
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
        """Forward and backward of every micro-batch; mean loss terms."""
        totals: dict[str, Tensor] = {}
        samples = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            timestep, terms = self._loss(batch)
            share = len(batch.indices) / samples
            self.precision.backward(terms["loss"].mean() * share)
            for name, term in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + term.detach().mean() * share
            self.bins.add(timestep, terms["loss"].detach().cpu())
        return {name: total.item() for name, total in totals.items()}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Timesteps [b] in 0..1000, on the CPU, and loss terms [b] of a micro-batch."""
        config = self.config.objective
        draws = draw(self.config.seed, batch.epoch, batch.indices, self._shape(batch))
        level = place_levels(draws.level, config)
        drop = (draws.drop < config.caption_dropout).to(self.device) if config.caption_dropout else None
        x0 = self._latents(batch, draws.posterior)
        self.text.give(batch.captions, batch.texts)
        terms = self._score(self.precision.module, x0, draws.noise, level, batch.captions, drop)
        return timestep_of(level, config), terms

    def _score(
        self, model: STDiT, x0: Tensor, noise: Tensor, level: Tensor, captions: list[str], drop: Tensor | None = None
    ) -> dict[str, Tensor]:
        y, mask = (tensor.to(self.device) for tensor in self.text(captions))
        noise, level = noise.to(self.device), level.to(self.device)
        with self.precision.autocast():
            return training_loss(model, self.config.objective, x0, noise, level, y, mask, drop=drop)

    def _latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """A posterior sample of the micro-batch, normalised: [b, C, T, H, W]."""
        return video_vae.sample_latents(self.components.vae, self._moments(batch.video), noise.to(self.device))

    def _shape(self, batch: Batch) -> tuple[int, ...]:
        """Of the latents of a micro-batch's clips: C, T, H, W."""
        if self.config.data.remember_latents:
            return self.latent_shape
        return video_vae.latent_shape(self.components.vae, *batch.bucket)

    def _moments(self, video: Tensor) -> Tensor:
        """What the VAE makes of clips [b, 3, T', H', W']; cached and remembered latents come as such."""
        video = video.to(self.device, non_blocking=True)
        return video if self.encoded else video_vae.encode_moments(self.components.vae, video)

    # -- what is not finite ----------------------------------------------------------------------------------------

    def _skip(self, batches: list[Batch], loss: float, norm: float) -> dict[str, float]:
        """Say what went wrong in a step that was not taken, and end the run when that keeps happening."""
        if math.isfinite(loss) and self.precision.loss_scale > 1.0:  # what the loss scale is there for
            self.watcher.said(f"step {self.step}: gradients overflowed, loss scale now {self.precision.loss_scale:g}")
            return {"skipped": 1.0}
        self.skipped += 1
        cause = next(filter(None, map(self._blame, batches)), "nothing, when the step was run again")
        line = f"step {self.step} skipped: loss {loss:g}, gradient norm {norm:g}; first not finite: {cause}"
        self.watcher.said(line)
        if self.skipped >= self.config.max_skipped:
            self._save(last=True)
            raise RunEnded(
                f"{self.skipped} steps in a row were not finite, the last: {line}. The weights before them are saved; "
                "go on with --resume and a lower --set optimizer.lr=..., or --set precision=fp32"
            )
        return {"skipped": 1.0}

    def _blame(self, batch: Batch) -> str | None:
        draws = draw(self.config.seed, batch.epoch, batch.indices, self._shape(batch))
        x0, y = self._latents(batch, draws.posterior), self.text(batch.captions)[0]
        clips = f"of clips {', '.join(map(str, batch.indices))}"
        inputs = {f"the VAE's latents {clips}": x0, f"the text encoder's states {clips}": y}
        return blame(self.precision.module, inputs, lambda: self._loss(batch)[1]["loss"].mean())

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
        with self._metrics() as metrics, Interrupts(self.watcher.said) as interrupts:
            self.watcher.started(self.step, config.steps)
            speed, steps = cache(self._speed), iter(self.loader)
            while self.progress < 1.0 and interrupts.number is None:
                started = time.perf_counter()
                batches = next(steps)
                waited = time.perf_counter() - started
                values = self.train_step(batches)
                self.elapsed += (seconds := time.perf_counter() - started)
                samples = sum(len(batch.indices) for batch in batches)
                values |= speed(samples, self._shape(batches[0])).figures(seconds, waited)
                self.watcher.stepped(self.step, self.progress, values)
                self._now_and_then(metrics, values, finished=self.progress >= 1.0)
            self.loader.close()
            self._save(last=True)
            save_pipeline(self.run.pipeline, self.ema.model, self.components, config)
            self._plot()
            if self.progress >= 1.0:
                self.run.note(finished_at_step=self.step)
        return Outcome(self.step, self.progress >= 1.0, values, interrupts.number)

    def _now_and_then(self, metrics: Metrics, values: dict[str, float], finished: bool) -> None:
        config, step = self.config, self.step
        if step % config.log_every == 0 or finished:
            metrics.write(step, values | self.bins.take())
        if self.validation is not None and (step % config.validate_every == 0 or finished):
            values["validation_loss"] = self.validate(self.validation)
            metrics.write(step, {"validation_loss": values["validation_loss"]})
            self.watcher.said(f"step {step}: validation loss {values['validation_loss']:.4f}")
        if step % config.sample_every == 0 or finished:
            sheet = draw_samples(self.ema.model, self.components, config, self.prompts, self.run.samples, step)
            self.watcher.said(f"step {step}: samples in {sheet}")
        if step % config.checkpoint_every == 0 and not finished:
            self._save()
            self._plot()

    def validate(self, dataset: ClipDataset) -> float:
        """Mean loss of the EMA weights over fixed clips, noise and evenly spread timesteps."""
        with torch.no_grad():
            return validation_loss(dataset, self.config.global_batch, self._validation_terms)

    def _validation_terms(self, video: Tensor, captions: list[str], indices: list[int], level: Tensor) -> Tensor:
        x0 = video_vae.sample_latents(self.components.vae, self._moments(video))
        noise = draw(0, 0, indices, self.latent_shape).noise
        return self._score(self.ema.model, x0, noise, level, captions)["loss"]

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

    def _plot(self) -> None:
        title = f"{self.config.stage}: {self.config.objective.name} loss"
        plot_losses(self.run.metrics_file, self.run.loss_plot, title)

    def _speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Of steps of so many samples with latents [C, T, H, W]."""
        config, model = self.config, self.model.config
        tokens = math.prod(n // p for n, p in zip(shape[1:], model.patch_size, strict=True))
        step_flops = flops.train_flops(model, (samples, *shape))
        return Speed(samples, tokens, step_flops, config.precision, self.device)

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Metrics]:
        """The run's metrics, closed at the end; a disk that is full by then is said, whatever was being written."""
        run, config = self.run, self.config
        wandb = wandb_run(config.wandb, run.id, run.path.name, run.path, to_dict(config)) if config.wandb else None
        try:
            metrics = Metrics(run.metrics_file, run.tensorboard, self.step, wandb)
            try:
                yield metrics
            finally:
                self.loader.close()
                with contextlib.suppress(OSError):
                    metrics.close()
        except RunEnded:
            raise
        except Exception as error:
            if is_full(error):
                raise disk_full(error, self.saver.newest()) from error
            raise
