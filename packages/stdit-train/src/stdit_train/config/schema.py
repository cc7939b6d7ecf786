"""The settings of a training run, as frozen dataclasses.

Sizes are in frames and pixels, times in steps unless a name says otherwise.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from stdit_model.presets import Variant, preset

PrecisionName = Literal["fp32", "bf16", "bf16-weights", "fp16"]


Checkpointing = bool | Literal["selective"]


@dataclass(frozen=True)
class ModelConfig:
    """The network. Latent channels and caption width follow from the VAE and the text encoder."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    preset: str = "XL/2"
    variant: Variant = "seq"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_max_length: int = 120  # text tokens
    space_scale: float = 1.0
    time_scale: float = 1.0
    depth: int | None = None  # the preset's unless set; likewise the next two
    hidden_size: int | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how they become frames."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: str = "shapes"  # the embedded set, or a folder or manifest of videos
    frames: int = 16
    height: int = 256
    width: int = 256
    interval: int | None = None  # source frames from one frame to the next; unless set 3 up to 16 frames, 2 above
    target_fps: float | None = None  # take frames at this rate, whatever the interval
    short: Literal["skip", "hold"] = "skip"  # videos too short: leave them out, or hold their last frame
    crop: Literal["center", "random"] = "center"
    place: Literal["random", "start", "center"] = "random"  # of a clip in its video
    flip: bool = False
    stream: int | None = None  # which video stream of a file, from 0; FFmpeg's best unless set
    root: str | None = None  # folder that a manifest's relative paths start from; the manifest's own unless set
    empty_captions: bool = False  # train on videos without a caption
    validation: float = 0.0  # share of the videos that is kept out of training, for the validation loss
    validation_source: str | None = None  # or a folder, manifest or cache of its own for that
    max_reject_share: float = 0.1  # of the clips may be unreadable before the run stops
    buckets: tuple[str, ...] = ()  # shapes to sort videos into, as in "16x256x256"; frames x height x width unless set
    tokens: int | None = None  # of a step: the batch of each bucket is what fits, in place of global_batch
    fps: float = 8.0  # at which samples are played
    clips: int = 8192  # of shapes, per epoch
    spread: float = 0.15  # of shapes: how far from the middle, at most, a shape starts; 0.5 is anywhere in the frame
    later: float = 0.0  # of shapes: share of clips that are cut out of a longer video, the shape anywhere
    caption_noise: float = 0.0  # share of clips that get the caption of another, to see what bad captions do
    remember_latents: bool = False  # encode each clip once and keep its latents in memory
    window: int = 16  # of a cache: shards that are shuffled together; 0 for all, which is the order of the clips
    workers: int = 2
    vae: str = "stabilityai/sd-vae-ft-ema"
    text_encoder: str = "DeepFloyd/t5-v1_1-xxl"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned (see `stdit_model.diffusion`)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["iddpm", "flow"] = "iddpm"
    shift: float = 1.0  # flow: moves noise levels towards 1
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: float = 0.0  # of logit-normal timesteps; above 0 more noise
    logit_std: float = 1.0
    min_snr: float | None = None  # iddpm: epsilon's error is weighted by min(SNR, this) / SNR; 5 in the paper
    caption_dropout: float = 0.1
    given: float = 0.0  # share of clips whose first frames are given, for a model that goes on from such
    given_of: Literal["any", "later"] = "any"  # which clips: all, or those that begin after their video's first frame


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as published, or Muon on the hidden matrices with AdamW on the rest."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-5
    muon_lr: float = 0.04
    muon_weight_decay: float = 0.1  # without it the matrices outgrow a rate this high
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 0  # steps
    decay: float = 0.0  # the last share of the run over which the learning rate falls linearly to zero
    ema: float = 0.9999


@dataclass(frozen=True)
class SamplingConfig:
    """How videos are drawn along the way, and what the finished checkpoint's defaults are."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: int = 100
    guidance: float = 7.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    steps: int
    global_batch: int
    micro_batch: int | None = None  # samples at once; the whole batch unless set
    seed: int = 0
    minutes: float | None = None  # a time budget: the schedule is fitted to it
    precision: PrecisionName = "bf16"  # see stdit_train.optim.precision
    activation_checkpointing: Checkpointing = False  # see stdit_train.distributed.parallelize.apply_ac
    compile: bool = False  # each block with torch.compile
    replicate: int = 1  # of many processes: copies of the weights, each in shards; 0 for one on each process
    sequence: int = 1  # of many processes: that share each clip
    profile: int = 0  # steps to trace, after two to warm up, into profile/ of the run's folder
    log_every: int = 10
    timestep_bins: int = 4  # equal parts of 0..1000 that the loss is logged by
    validate_every: int = 1000
    sample_every: int = 5000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2  # the newest
    keep_every: int | None = None  # and besides them those of every so many steps
    checkpoint_async: bool | None = None  # write while training goes on, from a copy; unless set, on a GPU
    max_skipped: int = 10  # non-finite steps in a row that end the run
    wandb: str | None = None  # a project there to log to as well
    init: str | None = None  # weights to start from
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()


def model_arguments(config: TrainConfig, latent_channels: int, caption_channels: int) -> dict[str, Any]:
    """The constructor arguments of a run's STDiT."""
    sizes = {key: getattr(config.model, key) for key in ("depth", "hidden_size", "num_heads")}
    return {
        **preset(config.model.preset),
        "variant": config.model.variant,
        "patch_size": config.model.patch_size,
        "model_max_length": config.model.model_max_length,
        "space_scale": config.model.space_scale,
        "time_scale": config.model.time_scale,
        "in_channels": latent_channels,
        "caption_channels": caption_channels,
        "learn_sigma": config.objective.name == "iddpm",
        **{key: value for key, value in sizes.items() if value is not None},
    }
