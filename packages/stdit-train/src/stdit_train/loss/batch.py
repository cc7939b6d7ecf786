"""What a model's answer to a micro-batch is worth: clips to latents, captions to states, draws, loss terms.

b samples of a micro-batch, C channels, T frames, H W latent height and width.
"""

import torch
from torch import Tensor

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.clip import ClipDataset
from stdit_data.loading.loader import Batch
from stdit_model import STDiT, video_vae
from stdit_train.components.captions import TextMemory
from stdit_train.components.load import Components
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.world import World
from stdit_train.loss.noise import draw
from stdit_train.loss.nonfinite import find_nonfinite
from stdit_train.loss.objective import given_frames, timestep_density, timestep_of, training_loss
from stdit_train.loss.validation import validation_loss
from stdit_train.optim.precision import Precision


class BatchLoss:
    """Scores a run's micro-batches and its validation clips.

    Args:
        config: the run's settings.
        components: VAE and text encoder, on `device`.
        precision: of the model that is trained.
        device: where all of it lives.
        encoded: clips come as the VAE's moments.
        world: Processes of the run.

    Raises:
        ConfigError, ValueError: sizes of clips that the VAE or the patches don't divide.
    """

    def __init__(
        self,
        config: TrainConfig,
        components: Components,
        precision: Precision,
        device: torch.device,
        encoded: bool,
        world: World,
    ) -> None:
        self.config, self.components, self.precision, self.device = config, components, precision, device
        self.encoded, self.world = encoded, world
        parts = components.tokenizer, components.text_encoder, components.texts
        self.text = TextMemory(*parts, config.model.model_max_length)
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

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Timesteps [b] in 0..1000, on the CPU, and loss terms [b] of a micro-batch."""
        config = self.config.objective
        draws = draw(self.config.seed, batch.epoch, batch.indices, self.shape(batch))
        level = timestep_density(draws.level, config)
        drop = (draws.drop < config.caption_dropout).to(self.device) if config.caption_dropout else None
        x0 = self._latents(batch, draws.posterior)
        given = self._given(batch, draws.given, x0.shape[2])
        states = self.text(batch.captions, batch.texts)
        terms = self._score(self.precision.module, x0, draws.noise, level, states, drop, given)
        return timestep_of(level, config), terms

    def _given(self, batch: Batch, draws: Tensor, frames: int) -> Tensor | None:
        """Which frames are given, [b, T], on the device; None where none ever is."""
        config = self.config.objective
        if not config.conditioning_share:
            return None
        given = given_frames(draws, config.conditioning_share, frames)
        if config.conditioning_clips == "later":
            given &= torch.tensor([start > 0 for start in batch.starts or [0.0] * len(given)])[:, None]
        return given.to(self.device)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        """Of the latents of a micro-batch's clips: C, T, H, W."""
        if self.config.data.cache_latents:
            return self.latent_shape
        return self._bucket_shape(batch.bucket)

    def _bucket_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        return video_vae.latent_shape(self.components.vae, *bucket)

    def validate(self, model: STDiT, dataset: ClipDataset) -> float:
        """Mean loss of a model over fixed clips, noise and evenly spread timesteps."""

        def terms(video: Tensor, captions: list[str], indices: list[int], level: Tensor) -> Tensor:
            x0 = video_vae.sample_latents(self.components.vae, self._moments(video))
            noise = draw(0, 0, indices, self.latent_shape).noise
            return self._score(model, x0, noise, level, self.text(captions))["loss"]

        with torch.no_grad():
            return validation_loss(dataset, self.config.global_batch, terms, self.world)

    def find_nonfinite(self, batches: list[Batch]) -> str | None:
        """What in a step was first not finite, when it is done once more."""
        return self.world.first_result(map(self._blame, batches))

    def _blame(self, batch: Batch) -> str | None:
        draws = draw(self.config.seed, batch.epoch, batch.indices, self.shape(batch))
        x0, y = self._latents(batch, draws.posterior), self.text(batch.captions, batch.texts)[0]
        clips = f"of clips {', '.join(map(str, batch.indices))}"
        inputs = {f"the VAE's latents {clips}": x0, f"the text encoder's states {clips}": y}
        if self.world.sharded:  # to run it once more takes all processes, of which some may be done looking
            return next((name for name, tensor in inputs.items() if not torch.isfinite(tensor).all()), None)
        return find_nonfinite(self.precision.module, inputs, lambda: self.loss(batch)[1]["loss"].mean())

    def _score(
        self,
        model: STDiT,
        x0: Tensor,
        noise: Tensor,
        level: Tensor,
        states: tuple[Tensor, Tensor],
        drop: Tensor | None = None,
        given: Tensor | None = None,
    ) -> dict[str, Tensor]:
        y, mask = (tensor.to(self.device) for tensor in states)
        noise, level = noise.to(self.device), level.to(self.device)
        with self.precision.autocast():
            return training_loss(model, self.config.objective, x0, noise, level, y, mask, drop, given)

    def _latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """A posterior sample of the micro-batch, normalised: [b, C, T, H, W]."""
        return video_vae.sample_latents(self.components.vae, self._moments(batch.video), noise.to(self.device))

    def _moments(self, video: Tensor) -> Tensor:
        """What the VAE makes of clips [b, 3, T', H', W']; cached and remembered latents come as such."""
        video = video.to(self.device, non_blocking=True)
        return video if self.encoded else video_vae.encode_moments(self.components.vae, video)
