"""A VAE as the task of a run: loss, validation, reconstructions along the way, and the folder at the end.

b samples of a micro-batch, C channels, T frames, H W height and width.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.loading.loader import Batch
from stdit_data.loading.order import Slot
from stdit_data.preview import contact_sheet
from stdit_data.storage.atomic import replace_text, write_atomically
from stdit_data.transforms import stack_videos, to_float
from stdit_data.video.write import write_mp4
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.data.holdout import VALIDATION_CLIPS
from stdit_train.distributed.side_work import on_every_rank
from stdit_train.distributed.world import World
from stdit_train.evaluation.video_metrics import WINDOW, psnr, ssim
from stdit_train.hardware import to_device
from stdit_train.loss.noise import draw, draw_philox
from stdit_train.loss.nonfinite import find_nonfinite
from stdit_train.loss.validation import validation_batches
from stdit_train.optim.optimizers import clip_gradients
from stdit_train.optim.precision import Precision
from stdit_train.task import Autocast
from stdit_train.tracking.throughput import Speed
from stdit_train.vae.networks import Networks, forward_needs, latent_size, recompute, reconstruct
from stdit_train.vae.reconstruction_loss import load_features, vae_loss

SHOWN = 4  # clips on the sheet
COLUMNS = 4  # frames of each


class VaeLoss:
    """Computes the loss of micro-batches, and PSNR and SSIM of validation clips.

    Args:
        config: settings of the run.
        precision: the networks that are trained, with their precision.
        device: device of this process.
        world: processes of the run.

    Raises:
        ConfigError: the features of the perceptual term cannot be loaded.
    """

    def __init__(self, config: TrainConfig, precision: Precision, device: torch.device, world: World) -> None:
        self.config, self.precision, self.device, self.world = config, precision, device, world
        path = config.vae.perceptual
        self.features = None if path is None else load_features(path, device)

    def in_memory(self, dataset: ClipDataset) -> ClipDataset:
        """Return the data set: a VAE is trained on pixels."""
        return dataset

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return NaN [b] in place of timesteps, and loss terms [b] of a micro-batch."""
        noise = batch.draws["posterior"] if batch.draws is not None else self._noise(batch)
        video, noise = to_float(to_device(batch.video, self.device)), to_device(noise, self.device)
        with self.precision.autocast():
            networks = cast(Networks, self.precision.module)
            terms = vae_loss(networks, self.config.vae, video, noise, batch.step, self.features)
        return torch.full((len(video),), math.nan), terms

    def _noise(self, batch: Batch) -> Tensor:
        return draw(self.config.draw, self.config.seed, batch.epoch, batch.indices, self.shape(batch)).posterior

    def shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape C, T', h, w of the latents of a micro-batch's clips."""
        return latent_size(self.config.vae, *batch.bucket)

    def draw(self, slot: Slot, bucket: Bucket) -> dict[str, Tensor]:
        """Draw the noise of a sample's posterior, in a thread of the loader."""
        numbers = draw_philox(self.config.seed, slot.epoch, slot.sample, latent_size(self.config.vae, *bucket))
        return {"posterior": numbers["posterior"]}

    @torch.no_grad()
    def validate(self, model: Any, dataset: ClipDataset) -> dict[str, float]:
        """Return L1 ("validation_loss"), PSNR and, of frames that are large enough, SSIM of reconstructed clips.

        The mean of the posterior is decoded. The processes share the clips, as for any validation.

        Raises:
            PartFailed: a clip could not be read, on one of several processes.
        """
        batch = self.config.micro_batch or self.config.global_batch // self.world.dp_size
        batches, rows = validation_batches(dataset, batch, self.world), []
        while (clips := on_every_rank(self.world, lambda: _next_clips(batches))) is not None:
            video = to_float(to_device(clips, self.device))
            with self.precision.autocast():
                again = reconstruct(model, video)[0].clamp(-1.0, 1.0)
            rows += [_scores(*pair) for pair in zip(again, video, strict=True)]
        table = self.world.all_gather(torch.tensor(rows).T.contiguous())[:, :VALIDATION_CLIPS]  # [measures, clips]
        names = ("validation_loss", "validation_psnr", "validation_ssim")
        return {name: float(row.mean()) for name, row in zip(names, table, strict=False)}

    def find_nonfinite(self, batches: list[Batch]) -> str | None:
        """Run a step again and name what is first not finite; None if all is."""
        return self.world.first_result(map(self._first_nonfinite, batches))

    def _first_nonfinite(self, batch: Batch) -> str | None:
        inputs = {f"the frames of clips {', '.join(map(str, batch.indices))}": to_float(batch.video)}
        return find_nonfinite(self.precision.module, inputs, lambda: self.loss(batch)[1]["loss"].mean())


class VaeTask:
    """A VAE, by option with a discriminator; each process has all weights.

    Args:
        config: settings of the run.
        model: the networks, in float32 on `device`.
        shown: clips to reconstruct along the way, and to measure the latents of.
        device: device of this process.
        world: processes of the run.
    """

    sharded = False

    def __init__(
        self, config: TrainConfig, model: Networks, shown: ClipDataset, device: torch.device, world: World
    ) -> None:
        self.config, self.model, self.shown, self.device, self.world = config, model, shown, device, world
        self.prompts: list[str] = []
        self.title = f"{config.stage}: loss of the VAE"

    @property
    def averaged(self) -> nn.Module:
        """Return the VAE, without the discriminator."""
        vae: nn.Module = self.model.vae
        return vae

    def build_average(self) -> nn.Module:
        """Return a float32 copy of the VAE."""
        return copy.deepcopy(self.averaged).float()

    def build_optimizers(self) -> list[Optimizer]:
        """Return AdamW for the VAE, and another for the discriminator where there is one."""
        config = self.config.optimizer
        options: Any = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
        return [AdamW(part.parameters(), **options) for part in self.model.children()]

    def prepare(self, module: Networks) -> None:
        """Recompute the blocks in the backward, with `activation_checkpointing`."""
        if self.config.activation_checkpointing:
            recompute(module.vae)

    def build_loss(self, precision: Precision, dataset: ClipDataset) -> VaeLoss:
        """Return the loss of clips."""
        return VaeLoss(self.config, precision, self.device, self.world)

    def clip_gradients(self, maximum: float) -> Tensor:
        """Average the gradients over the processes, clip those of each network, and return the norm of all before."""
        if self.world.size > 1:
            self._average_gradients()
        trained = (part for part in self.model.children() if any(p.grad is not None for p in part.parameters()))
        return torch.stack([clip_gradients(part, maximum) for part in trained]).norm()

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Return the speed meter of steps with so many samples of latents; the tokens are latent positions."""
        _, t, h, w = shape
        vae = self.config.vae
        frames = 1 + (t - 1) * vae.temporal if vae.kind == "video" else t
        forward = forward_needs(vae, 1, frames, h * vae.stride, w * vae.stride)
        own_flops = 3 * samples * forward.flops // self.world.size
        return Speed(samples, t * h * w, own_flops, self.config.precision, self.device)

    @torch.no_grad()
    def sample(self, model: Any, folder: Path | None, step: int, autocast: Autocast) -> Path | None:
        """Reconstruct a few clips and write original | reconstruction as mp4 and as a contact sheet."""
        if folder is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        pairs = []
        for clip in self._clips[:SHOWN]:
            with autocast():
                again = reconstruct(model, clip.video[None].to(self.device))[0][0].clamp(-1.0, 1.0).cpu()
            pairs.append(side_by_side(clip.video, again))
        captions = [f"original | reconstruction: {clip.caption}".rstrip(": ") for clip in self._clips[:SHOWN]]
        replace_text(folder / "prompts.txt", "".join(" ".join(caption.split()) + "\n" for caption in captions))
        for i, pair in enumerate(pairs):
            write_mp4(folder / f"step-{step:06d}-{i}.mp4", pair, self.config.data.fps)
        sheet = folder / f"step-{step:06d}.png"
        with write_atomically(sheet) as partial:
            contact_sheet(pairs, captions, columns=COLUMNS).save(partial, "PNG")
        return sheet

    @cached_property
    def _clips(self) -> list[Clip]:
        count = min(VALIDATION_CLIPS, len(self.shown))
        clips = (self.shown.load(index, seed=0, epoch=0) for index in range(count))
        return [replace(clip, video=to_float(clip.video)) for clip in clips]

    def publish(self, model: Any, run: RunFolder) -> None:
        """Write the VAE, with the statistics of its latents, as a folder for `from_pretrained` and `--vae`."""

        def write() -> None:
            if self.world.is_main:
                save_vae(model, run.vae, [clip.video for clip in self._clips], self.device)

        self.world.on_all(write)


def save_vae(vae: Any, folder: Path, clips: list[Tensor], device: torch.device) -> None:
    """Write a VAE as a folder; its latents are normalised by their mean and deviation over some clips [3, T, H, W]."""
    mean, deviation = latent_statistics(vae, clips, device)
    vae.register_to_config(
        latents_mean=mean.tolist(), latents_std=deviation.tolist(), scaling_factor=1.0, shift_factor=None
    )
    with write_atomically(folder) as partial:
        vae.save_pretrained(partial)


@torch.no_grad()
def latent_statistics(vae: Any, clips: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, each [C], of samples of the posteriors of clips [3, T, H, W]."""
    means, variances = [], []
    for clip in clips:
        _, mean, log_variance = reconstruct(vae, clip[None].to(device))
        means.append(mean[0].flatten(1).double().cpu())
        variances.append(log_variance[0].exp().flatten(1).double().cpu())
    mean, variance = torch.cat(means, dim=1), torch.cat(variances, dim=1)
    deviation = (mean.var(1, unbiased=False) + variance.mean(1)).sqrt()
    return mean.mean(1), torch.where(deviation > 1e-6, deviation, 1.0)  # a channel may have a single value


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Put two videos [3, T, H, W] side by side: [3, T, H, 2W + 2], with a white line between them."""
    return torch.cat([first, torch.ones_like(first[..., :2]), second], dim=-1)


def _next_clips(batches: Iterator[tuple[list[int], list[Clip], Tensor]]) -> Tensor | None:
    """Return the next validation clips [b, 3, T, H, W], None after the last."""
    batch = next(batches, None)
    return None if batch is None else stack_videos([clip.video for clip in batch[1]])


def _scores(again: Tensor, video: Tensor) -> list[float]:
    found = [(again - video).abs().mean().item(), psnr(again, video)]
    return [*found, ssim(again, video)] if min(video.shape[-2:]) >= WINDOW else found
