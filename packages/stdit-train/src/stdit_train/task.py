"""What a run trains: its network with the loss, the optimizers, and what comes of it along the way and at the end.

`Trainer` turns samples into steps, checkpoints and metrics, and knows no network. A `Task` is the rest.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stdit_data.buckets import Bucket
from stdit_data.clip import ClipDataset
from stdit_data.loading.loader import Batch
from stdit_data.loading.order import Slot
from stdit_model import STDiT, flops
from stdit_train.adapters import average_gradients, copy_trained, in_float32, save_adapter
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.parallelize import apply_ac, apply_compile, build_ema, clip_shapes, full_model
from stdit_train.distributed.world import World
from stdit_train.loss.batch import BatchLoss
from stdit_train.optim.optimizers import build_optimizers, clip_gradients
from stdit_train.optim.precision import Precision
from stdit_train.pipeline.save import draw_samples, save_pipeline
from stdit_train.tracking.throughput import Speed

Autocast = Callable[[], AbstractContextManager[Any]]


class Loss(Protocol):
    """The loss of a task's micro-batches and validation clips."""

    precision: Precision

    def in_memory(self, dataset: ClipDataset) -> ClipDataset:
        """Return a data set whose clips are encoded once, if the run keeps their latents; else the same."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return timesteps [b] in 0..1000, on the CPU, and loss terms [b] of a micro-batch, "loss" among them.

        A loss without timesteps returns NaN for each.

        The names of the terms are the same on all processes.
        """

    def shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape C, T, H, W of the latents of a micro-batch's clips."""

    def draw(self, slot: Slot, bucket: Bucket) -> dict[str, Tensor]:
        """Draw the random numbers of a sample, in a thread of the loader."""

    def validate(self, model: Any, dataset: ClipDataset) -> dict[str, float]:
        """Return the metrics of averaged weights on fixed clips, "validation_loss" among them, on every process."""

    def find_nonfinite(self, batches: list[Batch]) -> str | None:
        """Run a step again and name what is first not finite; None if all is."""


class Task(Protocol):
    """What a run trains.

    Attributes:
        prompts: captions that `sample` shows.
    """

    prompts: list[str]

    @property
    def model(self) -> nn.Module:
        """Return all weights that are trained, in float32."""

    @property
    def averaged(self) -> nn.Module:
        """Return the part of `model` whose average is kept, validated, sampled from and published."""

    @property
    def sharded(self) -> bool:
        """Return whether FSDP shards the weights.

        Otherwise each process has all of them, and `clip_gradients` averages the gradients over the processes.
        """

    @property
    def title(self) -> str:
        """Return the title of the plot of the losses."""

    def build_average(self) -> nn.Module:
        """Return a float32 copy of `averaged`."""

    def build_optimizers(self) -> list[Optimizer]:
        """Return the optimizers of `model`."""

    def prepare(self, module: Any) -> None:
        """Put activation checkpointing and compilation on the module that computes, unless the model has them."""

    def build_loss(self, precision: Precision, dataset: ClipDataset) -> Loss:
        """Return the loss of a data set's clips."""

    def clip_gradients(self, maximum: float) -> Tensor:
        """Clip the norm of the gradients in place and return the norm before, a scalar on the device."""

    def speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Return the speed meter of steps with so many samples of latents [C, T, H, W]."""

    def sample(self, model: Any, folder: Path | None, step: int, autocast: Autocast) -> Path | None:
        """Show what averaged weights can do, on all processes together, and return the path of the contact sheet.

        Args:
            model: the averaged weights.
            folder: where to write; None on all processes but one, which write nothing.
            step: the step, for the files' names.
            autocast: context for the model, as in training.

        Raises:
            PartFailed: a part failed on one of several processes.
        """

    def publish(self, model: Any, run: RunFolder) -> None:
        """Write averaged weights as a folder that can be loaded; all processes call this, rank 0 writes."""


@dataclass
class STDiTTask:
    """An STDiT with frozen VAE and text encoder.

    Args:
        config: settings of the run.
        model: float32 model on `device`, sharded where `world` has a mesh (see `build_model`).
        components: VAE and text encoder, on `device`.
        prompts: prompts of the samples along the way.
        device: device of this process.
        world: processes of the run, with its mesh.
    """

    config: TrainConfig
    model: STDiT
    components: Components
    prompts: list[str]
    device: torch.device
    world: World

    @property
    def averaged(self) -> STDiT:
        """Return the model."""
        return self.model

    @property
    def sharded(self) -> bool:
        """Return whether there are several processes."""
        return self.world.sharded

    @property
    def title(self) -> str:
        """Return the stage and its objective."""
        return f"{self.config.stage}: {self.config.objective.name} loss"

    def build_average(self) -> STDiT:
        """Return a float32 copy of the model, sharded where the model is."""
        return build_ema(self.model, self.world)

    def build_optimizers(self) -> list[Optimizer]:
        """Return AdamW, or Muon and AdamW."""
        return build_optimizers(self.model, self.config.optimizer)

    def prepare(self, module: STDiT) -> None:
        """Put activation checkpointing and compilation on a model that is not sharded."""
        if not self.sharded:  # else `build_model` has done it
            apply_ac(module, self.config.activation_checkpointing)
            if self.config.compile:
                apply_compile(module, clip_shapes(self.config))

    def build_loss(self, precision: Precision, dataset: ClipDataset) -> BatchLoss:
        """Return the loss of clips, or of moments of the VAE."""
        encoded = getattr(dataset, "moments", False) or self.config.data.cache_latents
        return BatchLoss(self.config, self.components, precision, self.device, encoded, len(dataset), self.world)

    def clip_gradients(self, maximum: float) -> Tensor:
        """Clip the global norm of the gradients."""
        return clip_gradients(self.model, maximum)

    def speed(self, samples: int, shape: tuple[int, ...]) -> Speed:
        """Return the speed meter of steps with so many samples of latents [C, T, H, W]."""
        model = self.averaged.config
        tokens = math.prod(n // p for n, p in zip(shape[1:], model.patch_size, strict=True))
        own_flops = self.step_flops((samples, *shape)) // self.world.size
        return Speed(samples, tokens, own_flops, self.config.precision, self.device)

    def step_flops(self, shape: tuple[int, ...]) -> int:
        """Return the FLOPs of steps with clips of shape [B, C, T, H, W], on all processes."""
        return flops.train_flops(self.model.config, shape)

    def sample(self, model: STDiT, folder: Path | None, step: int, autocast: Autocast) -> Path | None:
        """Sample a video per prompt; see `draw_samples`."""
        return draw_samples(model, self.components, self.config, self.prompts, folder, step, self.world, autocast)

    def publish(self, model: STDiT, run: RunFolder) -> None:
        """Write the pipeline folder."""
        average = full_model(model, self.world)

        def write() -> None:
            if average is not None:
                save_pipeline(run.pipeline, average, self.components, self.config)

        self.world.on_all(write)


@dataclass
class PartialTask(STDiTTask):
    """A part of an STDiT, whose other weights are frozen: its adapter, or its temporal attention.

    Args:
        config, components, prompts, device, world: as of `STDiTTask`.
        model: on `device`, as `stdit_train.adapters.build_partial` makes it.
        digest: SHA-256 of the weights that it was made from.
    """

    digest: str = ""

    @property
    def sharded(self) -> bool:
        """Return False: every process has all weights."""
        return False

    def build_average(self) -> STDiT:
        """Return a copy of the model that shares its frozen weights."""
        return copy_trained(self.model)

    def clip_gradients(self, maximum: float) -> Tensor:
        """Average the gradients over the processes, and clip their global norm."""
        if self.world.size > 1:
            average_gradients(self.model)
        return clip_gradients(self.model, maximum)

    def step_flops(self, shape: tuple[int, ...]) -> int:
        """Return the FLOPs of steps with clips of shape [B, C, T, H, W], on all processes."""
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        added = self.config.lora.rank is not None
        return flops.partial_train_flops(self.model.config, shape, trained, added=added)

    def publish(self, model: STDiT, run: RunFolder) -> None:
        """Write the adapter, or the pipeline folder."""

        def write() -> None:
            if not self.world.is_main:
                return
            if self.config.lora.rank is not None:
                save_adapter(run.path, model)
            else:
                save_pipeline(run.pipeline, in_float32(model), self.components, self.config)

        self.world.on_all(write)
