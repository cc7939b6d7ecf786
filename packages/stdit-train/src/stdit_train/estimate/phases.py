"""Memory of what a run does besides its training steps: encode, update the weights, validate, sample.

None of it runs while activations are kept, so the peak of a run is the largest phase, not their sum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stdit_model import flops
from stdit_train.config.batches import own_shape
from stdit_train.config.schema import SAMPLED_PROMPTS, TrainConfig
from stdit_train.distributed.dims import ParallelDims
from stdit_train.estimate.frozen import decoding_bytes, encoding_bytes, text_bytes
from stdit_train.estimate.muon import MuonMemory
from stdit_train.estimate.parallel import gathered_bytes, parameter_shapes

STEP = "training step"


@dataclass(frozen=True)
class Work:
    """What a process does besides its steps.

    Attributes:
        config: of the run.
        model: all arguments of STDiT's constructor.
        vae: arguments of AutoencoderKL; None if the run trains on a cache of latents.
        decoder: the same, of the VAE that decodes samples.
        text: arguments of T5Config; None if the states of all captions are in a cache.
        latent: C, T, H, W of a clip's latents.
        micro_batch: samples at once.
        accumulated: whether gradients are held while a micro-batch is encoded.
        dims: how the processes share the run.
        muon: what Muon needs.
    """

    config: TrainConfig
    model: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    decoder: Mapping[str, Any]
    text: Mapping[str, Any] | None
    latent: tuple[int, int, int, int]
    micro_batch: int
    accumulated: bool
    dims: ParallelDims
    muon: MuonMemory

    def phases(self, memory: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of each phase by its name.

        Args:
            memory: of a training step, by part.
        """
        config = self.config
        copy = memory["EMA"] // 2 if config.precision == "bf16-weights" and self.dims.world_size == 1 else 0
        lasting = 2 * memory["EMA"] + copy + memory["optimizer"] + memory["VAE and text encoder"]
        held = lasting + (memory["gradients"] if self.accumulated or config.data.cache_latents else 0)
        phases = {
            "VAE encoding": held + self.encoding() if self.vae is not None else 0,
            "text encoding": held + self.texts(self.micro_batch) if self.text is not None else 0,
            "optimizer step": lasting + memory["EMA"] + self.muon.buffers,  # the gradients are as large as the average
            "validation": lasting + self.validation() if _validates(config) else 0,
            "sampling": lasting + self.sampling(),
        }
        return {name: size for name, size in phases.items() if size}

    def encoding(self) -> int:
        """Return the bytes that encoding a micro-batch takes; clips whose latents are kept are encoded one by one."""
        clips = 1 if self.config.data.cache_latents else self.micro_batch
        return 0 if self.vae is None else encoding_bytes(self.vae, clips, own_shape(self.config.data))

    def texts(self, captions: int) -> int:
        """Return the bytes that encoding captions takes."""
        if self.text is None:
            return 0
        return text_bytes(self.text, captions, self.model["model_max_length"], text_itemsize(self.config))

    def validation(self) -> int:
        """Return the bytes that a micro-batch of the validation loss takes."""
        return max(self.encoding(), self.texts(self.micro_batch), self.forward(self.micro_batch))

    def sampling(self) -> int:
        """Return the bytes that sampling this process's prompts takes, at most a micro-batch of them at once."""
        share = -(-SAMPLED_PROMPTS // self.dims.data)
        clips = min(share, self.micro_batch)
        guided = 1 if self.config.sampling.guidance == 1.0 else 2
        decoding = decoding_bytes(self.decoder, clips, own_shape(self.config.data))
        return max(self.texts(share), self.forward(guided * clips), decoding)

    def forward(self, batch: int) -> int:
        """Return the bytes of a forward of the average, which is gathered in float32, or cast weight by weight."""
        itemsize = 4 if self.config.precision == "fp32" else 2
        channels, frames, height, width = self.latent
        patch = self.model["patch_size"][0]
        own = patch * -(-(frames // patch) // self.dims.sequence)
        working = flops.forward_bytes(self.model, (batch, channels, own, height, width), None, itemsize)
        if self.dims.world_size > 1:
            return working + gathered_bytes(self.model, 4)
        shapes = parameter_shapes(self.model).values()
        largest = max(math.prod(shape) for shape in shapes)
        return working + (itemsize * largest if itemsize < 4 else 0)


def text_itemsize(config: TrainConfig) -> int:
    """Return the bytes of a text encoder's weights and activations."""
    return 4 if config.precision in ("fp32", "fp16") else 2


def _validates(config: TrainConfig) -> bool:
    data = config.data
    return data.source == "shapes" or bool(data.validation) or data.validation_source is not None
