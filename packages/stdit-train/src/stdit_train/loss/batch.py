"""From a micro-batch to its loss: latents of the clips, states of the captions, random numbers, loss terms.

b samples of a micro-batch, C channels, T frames, H W latent height and width.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.loading.loader import Batch
from stdit_data.loading.order import Slot
from stdit_data.transforms import stack_videos, to_float
from stdit_model import STDiT, video_vae
from stdit_train.components.captions import TextMemory
from stdit_train.components.load import Components
from stdit_train.config.batches import clips_per_step
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import cached_in_memory
from stdit_train.data.holdout import VALIDATION_CLIPS
from stdit_train.distributed.side_work import on_every_rank
from stdit_train.distributed.world import World
from stdit_train.hardware import to_device
from stdit_train.loss.noise import Draws, draw, draw_philox
from stdit_train.loss.nonfinite import find_nonfinite
from stdit_train.loss.objective import given_frames, timestep_density, timestep_of, training_loss
from stdit_train.loss.validation import validation_batches
from stdit_train.optim.precision import Precision


class BatchLoss:
    """Computes the loss of a run's micro-batches and validation clips.

    Args:
        config: settings of the run.
        components: VAE and text encoder, on `device`.
        precision: the model that is trained, with its precision.
        device: device of this process.
        encoded: whether clips are moments of the VAE instead of pixels.
        clips: number of training clips.
        world: processes of the run.

    Raises:
        ConfigError: the patch size does not divide the latents of the clips.
        ValueError: the VAE does not divide the clips.
    """

    def __init__(
        self,
        config: TrainConfig,
        components: Components,
        precision: Precision,
        device: torch.device,
        encoded: bool,
        clips: int,
        world: World,
    ) -> None:
        self.config, self.components, self.precision, self.device = config, components, precision, device
        self.encoded, self.world = encoded, world
        parts = components.tokenizer, components.text_encoder, components.texts
        self.text = TextMemory(*parts, config.model.model_max_length, clips)
        self.validation_text = TextMemory(*parts, config.model.model_max_length, VALIDATION_CLIPS)
        data = config.data
        self.latent_shape = video_vae.latent_shape(components.vae, data.frames, data.height, data.width)
        for size in (self.latent_shape, *(self._bucket_shape(parse_bucket(bucket)) for bucket in data.buckets)):
            if any(axis % patch for axis, patch in zip(size[1:], config.model.patch_size, strict=True)):
                patch = "x".join(map(str, config.model.patch_size))
                latents = "x".join(map(str, size[1:]))
                raise ConfigError(
                    f"model.patch_size {patch} does not divide the clips' latents, which are {latents}: set other "
                    "data.frames, data.height or data.width"
                )

    def in_memory(self, dataset: ClipDataset) -> ClipDataset:
        """Return a data set whose clips are encoded once, if the loss takes latents; else the same."""
        return cached_in_memory(dataset, self.components.vae, self.device) if self.encoded else dataset

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return timesteps [b] in 0..1000, on the CPU, and loss terms [b] of a micro-batch."""
        config = self.config.objective
        draws = self._draws(batch)
        level = timestep_density(draws.level, config)
        drop = to_device(draws.drop < config.caption_dropout, self.device) if config.caption_dropout else None
        x0 = self._latents(batch, draws.posterior)
        given = self._given(batch, draws.given, x0.shape[2])
        states = self.text(batch.captions, batch.texts)
        terms = self._terms(cast(STDiT, self.precision.module), x0, draws.noise, level, states, drop, given)
        return timestep_of(level, config), terms

    def _given(self, batch: Batch, draws: Tensor, frames: int) -> Tensor | None:
        """Return which frames condition the others, [b, T] bool on the device; None if the run has none."""
        config = self.config.objective
        if not config.conditioning_share:
            return None
        given = given_frames(draws, config.conditioning_share, frames)
        if config.conditioning_clips == "later":
            given &= torch.tensor([start > 0 for start in batch.starts or [0.0] * len(given)])[:, None]
        return to_device(given, self.device)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape C, T, H, W of the latents of a micro-batch's clips."""
        return self._loaded_shape(batch.bucket)

    def draw(self, slot: Slot, bucket: Bucket) -> dict[str, Tensor]:
        """Draw the random numbers of a sample, in a thread of the loader; see `loss.noise`."""
        return draw_philox(self.config.seed, slot.epoch, slot.sample, self._loaded_shape(bucket))

    def _draws(self, batch: Batch) -> Draws:
        if batch.draws is not None:
            return Draws(**batch.draws)
        return draw(self.config.draw, self.config.seed, batch.epoch, batch.indices, self.shape(batch))

    def _loaded_shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Return C, T, H, W of a bucket of the loader, which is of latents if those are kept in memory."""
        return (self.latent_shape[0], *bucket) if self.config.data.cache_latents else self._bucket_shape(bucket)

    def _bucket_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        return video_vae.latent_shape(self.components.vae, *bucket)

    @torch.no_grad()
    def validate(self, model: STDiT, dataset: ClipDataset) -> dict[str, float]:
        """Return the mean loss of a model over fixed clips, noise and evenly spread timesteps, as "validation_loss".

        The processes share the clips; where they do not divide evenly, some are computed twice and counted once.

        Args:
            model: model to evaluate.
            dataset: validation clips; a dataset shorter than the number of validation clips repeats.

        Raises:
            PartFailed: a clip could not be read or encoded, on one of several processes.
        """
        losses, ranks = [], self.world.dp_size
        batch = self.config.micro_batch or clips_per_step(self.config, ranks) // ranks  # as many as fit in training
        batches = validation_batches(dataset, batch, self.world)
        while (inputs := on_every_rank(self.world, lambda: self._validation_inputs(batches))) is not None:
            losses.append(self._terms(model, *inputs)["loss"])
        loss = self.world.all_gather(torch.cat(losses).cpu())[:VALIDATION_CLIPS].mean()
        return {"validation_loss": float(loss)}

    def _validation_inputs(
        self, batches: Iterator[tuple[list[int], list[Clip], Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
        """Return latents, noise, levels and caption states of the next validation clips, None after the last."""
        batch = next(batches, None)
        if batch is None:
            return None
        indices, clips, level = batch
        x0 = video_vae.sample_latents(self.components.vae, self._moments(stack_videos([c.video for c in clips])))
        noise = draw(self.config.draw, 0, 0, indices, self.latent_shape).noise
        return x0, noise, level, self.validation_text([c.caption for c in clips])

    def find_nonfinite(self, batches: list[Batch]) -> str | None:
        """Run a step again and name what is first not finite; None if all is."""
        return self.world.first_result(map(self._first_nonfinite, batches))

    def _first_nonfinite(self, batch: Batch) -> str | None:
        x0, y = self._latents(batch, self._draws(batch).posterior), self.text(batch.captions, batch.texts)[0]
        clips = f"of clips {', '.join(map(str, batch.indices))}"
        inputs = {f"the VAE's latents {clips}": x0, f"the text encoder's states {clips}": y}
        if self.world.sharded:  # running the model takes all processes, and some may have finished
            return next((name for name, tensor in inputs.items() if not torch.isfinite(tensor).all()), None)
        return find_nonfinite(self.precision.module, inputs, lambda: self.loss(batch)[1]["loss"].mean())

    def _terms(
        self,
        model: STDiT,
        x0: Tensor,
        noise: Tensor,
        level: Tensor,
        states: tuple[Tensor, Tensor],
        drop: Tensor | None = None,
        given: Tensor | None = None,
    ) -> dict[str, Tensor]:
        y, mask, noise, level = (to_device(tensor, self.device) for tensor in (*states, noise, level))
        with self.precision.autocast():
            return training_loss(model, self.config.objective, x0, noise, level, y, mask, drop, given)

    def _latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return normalised posterior samples of the micro-batch: [b, C, T, H, W]."""
        return video_vae.sample_latents(self.components.vae, self._moments(batch.video), to_device(noise, self.device))

    def _moments(self, video: Tensor) -> Tensor:
        """Return the VAE's moments of clips [b, 3, T', H', W'], which may be moments already."""
        video = to_device(video, self.device)  # as uint8, a quarter of the bytes
        return video if self.encoded else video_vae.encode_moments(self.components.vae, to_float(video))
