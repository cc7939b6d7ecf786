"""Settings of a training run: frozen dataclasses whose fields carry their bounds.

Sizes are in frames and pixels, durations in optimizer steps unless a name says otherwise.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from stdit_data.buckets import Bucket, batch_sizes, parse_bucket
from stdit_data.errors import DataError
from stdit_model.presets import Variant, preset
from stdit_train.errors import ConfigError

PrecisionName = Literal["fp32", "bf16", "bf16-weights", "fp16"]
DrawName = Literal["philox", "mt19937"]
Checkpointing = bool | Literal["selective"]

SAMPLED_PROMPTS = 4  # sampled during training

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class ModelConfig:
    """The network. Latent channels and caption width follow from the VAE and the text encoder."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    preset: str = "XL/2"
    variant: Variant = "seq"
    patch_size: tuple[Count, Count, Count] = (1, 2, 2)
    model_max_length: Count = 120  # text tokens
    space_scale: Positive = 1.0
    time_scale: Positive = 1.0
    depth: Count | None = None  # [default: the preset's]
    hidden_size: Count | None = None  # [default: the preset's]
    num_heads: Count | None = None  # [default: the preset's]


@dataclass(frozen=True)
class DataConfig:
    """The clips, how they are read, and the frozen models that encode them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: str = "shapes"  # the embedded set, or a folder, manifest or latent cache
    frames: Count = 16
    height: Count = 256
    width: Count = 256
    interval: Count | None = None  # every n-th source frame [default: 3 up to 16 frames, else 2]
    target_fps: Positive | None = None  # frames per second to read clips at; takes precedence over interval
    short: Literal["skip", "hold"] = "skip"  # for videos that are too short: leave out, or repeat the last frame
    crop: Literal["center", "random"] = "center"
    place: Literal["random", "start", "center"] = "random"  # start of a clip in its video
    flip: bool = False  # mirror half of the clips
    stream: WholeNumber | None = None  # video stream of a file, from 0 [default: FFmpeg's choice]
    root: str | None = None  # folder of a manifest's relative paths [default: the manifest's]
    confine: bool = False  # refuse paths that lead out of the root, as a stranger's manifest may have
    empty_captions: bool = False  # train on videos without a caption
    validation: Share = 0.0  # share of the videos held out for the validation loss
    validation_source: str | None = None  # a folder, manifest or cache for the validation loss instead
    max_reject_share: Share = 0.1  # share of unreadable clips at which a run stops
    patience: Annotated[float, Field(ge=0, le=20)] = 10.0  # minutes to wait for a store or disk that fails
    buckets: tuple[str, ...] = ()  # clip shapes, as 16x256x256 [default: frames x height x width alone]
    tokens: Count | None = None  # tokens per step; sets the batch of each bucket, in place of global_batch
    batch_multiple: Count = 8  # of tokens: a batch is a multiple of it, or its largest divisor that fits
    fps: Positive = 8.0  # frame rate of samples
    clips: Count = 8192  # of `shapes`, per epoch
    spread: Annotated[float, Field(ge=0, le=0.5)] = 0.15  # of `shapes`: farthest start from the middle; 0.5 anywhere
    later: Share = 0.0  # of `shapes`: share of clips cut from a longer video, where the shape is anywhere
    single_frames: Share = 0.0  # of `shapes`: share of clips that are a single frame
    caption_noise: Share = 0.0  # share of clips with the caption of another clip
    cache_latents: bool = False  # encode each clip once and keep its latents in memory
    window: WholeNumber = 16  # of a cache: shards shuffled together; 0 reads the clips in their order
    workers: WholeNumber = 2
    prefetch_bytes: WholeNumber = 1 << 30  # of clips read ahead in a process, at most; one step's, if that is more
    vae: str = "stabilityai/sd-vae-ft-ema"  # a folder, Hub id, or "demo"
    text_encoder: str = "DeepFloyd/t5-v1_1-xxl"  # a folder, Hub id, or "demo"

    def __post_init__(self) -> None:
        """Check what spans fields."""
        for bucket in self.buckets:
            try:
                parse_bucket(bucket)
            except DataError as error:
                raise ConfigError(f"data.buckets: {error}") from None
        if self.tokens is not None and not self.buckets:
            raise ConfigError("data.tokens needs data.buckets: set these too, or set global_batch instead")
        if self.tokens is not None:
            try:
                batch_sizes([parse_bucket(bucket) for bucket in self.buckets], self.tokens)
            except DataError as error:
                raise ConfigError(f"data.tokens: {error}") from None
        if self.validation == 1.0:
            raise ConfigError("data.validation is 1: no videos are left to train on")
        if self.validation and self.validation_source is not None:
            raise ConfigError(
                "data.validation holds videos of data.source out, data.validation_source names others: set one"
            )
        if self.source == "shapes" and (self.validation or self.validation_source is not None):
            raise ConfigError("data.validation and data.validation_source are for videos: `shapes` has its own clips")
        if self.source == "shapes" and self.buckets:
            raise ConfigError("data.buckets are for videos (--data): `shapes` is drawn at one size")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective (see `stdit_model.diffusion`)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["iddpm", "flow"] = "iddpm"
    shift: Positive = 1.0  # flow: above 1 moves the noise levels towards 1
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: Finite = 0.0  # of logit-normal timesteps; above 0 means more noise
    logit_std: Positive = 1.0
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"  # of iddpm
    zero_terminal_snr: bool = False  # iddpm: the last timestep is noise alone, which takes prediction=v_prediction
    min_snr: Positive | None = None  # iddpm: weights the error of x0 by min(SNR, this); 5 in the paper
    weighting: Literal["own", "velocity"] = "own"  # iddpm: the error of what is predicted, or that of v
    bound: NonNegative = 1.0  # iddpm: weight of the variational bound, which trains the variance
    caption_dropout: Share = 0.1
    conditioning_share: Share = 0.0  # share of clips with nearly clean first frames, to learn to continue videos
    conditioning_clips: Literal["any", "later"] = "any"  # all clips, or those that begin after their video's start

    def __post_init__(self) -> None:
        """Check what spans fields."""
        own = {
            "min_snr": self.min_snr is not None,
            "prediction": self.prediction != "epsilon",
            "zero_terminal_snr": self.zero_terminal_snr,
            "weighting": self.weighting != "own",
            "bound": self.bound != 1.0,
        }
        if self.name != "iddpm" and (wrong := next((key for key, given in own.items() if given), None)):
            raise ConfigError(f"objective.{wrong} needs objective.name=iddpm, not {self.name}")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ConfigError(
                "objective.zero_terminal_snr leaves epsilon nothing to say at the last timestep: "
                "set objective.prediction=v_prediction"
            )
        if self.min_snr is not None and self.weighting != "own":
            raise ConfigError("objective.min_snr and objective.weighting are two weights of one loss: set one")

    @property
    def weighted(self) -> bool:
        """Whether the loss of iddpm is another sum of its terms than the published one."""
        return self.min_snr is not None or self.weighting != "own" or self.bound != 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as published, or Muon on the hidden matrices with AdamW on the rest."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["adamw", "muon"] = "adamw"
    lr: NonNegative = 2e-5
    muon_lr: NonNegative = 0.04
    muon_weight_decay: NonNegative = 0.1  # without it, the matrices grow too large at this learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient; inf turns clipping off
    warmup: WholeNumber = 0  # steps
    decay: Share = 0.0  # last share of the run, over which the learning rate falls linearly to zero
    ema: Share = 0.9999


@dataclass(frozen=True)
class VaeConfig:
    """The VAE of a run with `network = "vae"`: its sizes and its losses (see `stdit_train.vae`)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["image", "video"] = "image"  # diffusers' AutoencoderKL, or a causal video VAE
    temporal: Literal[1, 2, 4] = 4  # of a video VAE: frames per latent after the first, which has one of its own
    latent_channels: Count = 4
    bottleneck: Literal["kl", "fsq"] = "kl"  # normal posteriors, or codes of a few levels (FSQ) in a video VAE
    levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)  # of FSQ, one for each latent channel
    channels: tuple[Count, ...] = (128, 256, 512, 512)  # at each size; each but the first halves height and width
    layers: Count = 2  # blocks at each size of the encoder; the decoder has one more
    groups: Count = 32  # of the norms; divides all channels
    attention: bool = True  # in the middle
    kl: NonNegative = 1e-6  # weight of the divergence, per value of the frames
    perceptual: str | None = None  # TorchScript file: frames [N, 3, H, W] in [-1, 1] to feature maps [N, C, h, w]
    perceptual_weight: NonNegative = 1.0
    discriminator: Literal["none", "2d", "3d"] = "none"  # of patches of frames, or of clips
    discriminator_start: WholeNumber = 20_000  # steps before it takes part
    discriminator_weight: NonNegative = 0.5  # times the adaptive weight
    discriminator_channels: Count = 64
    discriminator_layers: Count = 3

    def __post_init__(self) -> None:
        """Check what spans fields."""
        if odd := [width for width in self.channels if width % self.groups]:
            raise ConfigError(f"vae.groups {self.groups} does not divide vae.channels {odd[0]}")
        if self.kind == "video" and self.temporal > 2 ** (len(self.channels) - 1):
            needed = self.temporal.bit_length()
            raise ConfigError(f"vae.temporal {self.temporal} needs {needed} vae.channels, not {len(self.channels)}")
        if self.bottleneck == "fsq" and self.kind != "video":
            raise ConfigError(
                "vae.bottleneck=fsq is for video VAEs: set vae.kind=video, with vae.temporal=1 for frames"
            )
        if self.bottleneck == "fsq" and len(self.levels) != self.latent_channels:
            raise ConfigError(
                f"vae.levels has {len(self.levels)} numbers for vae.latent_channels {self.latent_channels}: give one "
                "for each channel"
            )

    @property
    def stride(self) -> int:
        """Return the pixels per latent along height and width."""
        return int(2 ** (len(self.channels) - 1))

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Check that the VAE can take clips of a size.

        Raises:
            ConfigError: it cannot; the message has the nearest sizes that it can.
        """
        for name, size in (("height", height), ("width", width)):
            if size % self.stride:
                low = max(self.stride, size // self.stride * self.stride)
                nearest = f"take {low} or {low + self.stride}"
                raise ConfigError(f"data.{name} {size} is not a multiple of the VAE's stride {self.stride}: {nearest}")
        if self.kind == "video" and (frames - 1) % self.temporal:
            low = (frames - 1) // self.temporal * self.temporal + 1
            raise ConfigError(
                f"{frames} frames: a video VAE of vae.temporal {self.temporal} takes 1 + a multiple of it, the nearest "
                f"are {low} and {low + self.temporal} (data.frames, data.buckets)"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """Samples during training, and the defaults of the finished pipeline."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: Count = 100
    guidance: NonNegative = 7.0


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA adapter (arXiv:2106.09685), trained in place of the model's own weights."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: Count | None = None  # of the updates; setting it trains an adapter
    alpha: Positive | None = None  # updates are scaled by alpha / rank [default: the rank]
    modules: tuple[str, ...] | None = None  # parts of a block to adapt [default: all of its attention]


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    steps: Count
    global_batch: Count
    micro_batch: Count | None = None  # samples at once per process [default: as many as fit]
    seed: WholeNumber = 0
    draw: DrawName = "philox"  # generator of noise, timesteps and dropout; mt19937 for runs begun before version 0.2
    minutes: Positive | None = None  # time budget; the learning-rate schedule is fitted to it
    precision: PrecisionName = "bf16"  # see stdit_train.optim.precision
    activation_checkpointing: Checkpointing = False  # see stdit_train.distributed.parallelize.apply_ac
    compile: bool = False  # torch.compile each block
    replicate: WholeNumber | None = None  # replicas of the weights, each sharded; 0 for a full copy on each process
    # [default: 1 up to 8 processes, else one on each node]
    reduce_once: bool | None = None  # sum gradients over the processes once a step, not in every micro-batch, for 4
    # bytes of memory per parameter [default: true]
    sequence: Count = 1  # processes that share each clip
    profile: WholeNumber = 0  # steps to trace, after two to warm up, into profile/ of the run's folder
    log_every: Count = 10
    timestep_bins: Count = 4  # equal bins of 0..1000 to log the loss by
    validate_every: Count = 1000
    sample_every: Count = 5000
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2  # how many of the newest to keep
    keep_every: Count | None = None  # also keep every n-th step's checkpoint
    checkpoint_async: bool | None = None  # write from a copy while training continues [default: on a GPU]
    max_skipped: Count = 10  # consecutive non-finite steps that end the run
    wandb: str | None = None  # Weights & Biases project to log to
    init: str | None = None  # weights to start from
    network: Literal["stdit", "vae"] = "stdit"  # what is trained: the diffusion transformer, or a VAE by itself
    trained_weights: Literal["all", "temporal"] = "all"  # of the transformer: all, or the temporal attention alone
    frozen: Literal["fp32", "bf16", "int8"] = "fp32"  # precision of weights that are not trained; int8 needs torchao
    lora: LoRAConfig = LoRAConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    vae: VaeConfig = VaeConfig()

    @property
    def partial(self) -> bool:
        """Return whether a part alone is trained: an adapter, or some of the weights. The rest is that of `init`."""
        return self.lora.rank is not None or self.trained_weights != "all"

    def __post_init__(self) -> None:
        """Check what spans the parts."""
        if self.network == "vae":
            self._check_vae()
        self._check_partial()
        later_only = self.objective.conditioning_share > 0 and self.objective.conditioning_clips == "later"
        if later_only and self.data.source == "shapes" and not self.data.later:
            raise ConfigError(
                "objective.conditioning_clips=later: `shapes` has such clips with data.later above 0 only"
            )

    def _check_vae(self) -> None:
        refused = {
            "optimizer.name": (self.optimizer.name, "adamw"),
            "precision": (self.precision if self.precision == "fp16" else "", ""),
            "compile": (self.compile, False),
            "sequence": (self.sequence, 1),
            "data.cache_latents": (self.data.cache_latents, False),
            "trained_weights": (self.trained_weights, "all"),
        }
        for key, (value, only) in refused.items():
            if value != only:
                other = "bf16" if key == "precision" else str(only).lower()
                raise ConfigError(f"{key} is {str(value).lower()}, which a VAE cannot have: --set {key}={other}")
        if self.lora.rank is not None:
            raise ConfigError("lora.rank is for a transformer: a VAE is trained as a whole, leave it out")
        buckets = [parse_bucket(bucket) for bucket in self.data.buckets]
        sizes = buckets or [Bucket(self.data.frames, self.data.height, self.data.width)]
        for size in sizes:
            self.vae.check_clip(*size)
        if self.vae.kind == "video" and all(frames == 1 for frames, _, _ in sizes):
            raise ConfigError(
                f"a video VAE needs clips, not images alone: set data.frames to {1 + self.vae.temporal} or more"
            )

    def _check_partial(self) -> None:
        if not self.partial:
            if self.frozen != "fp32":
                raise ConfigError(f"frozen={self.frozen} is for --lora and --train temporal, which freeze weights")
            if self.lora.modules is not None or self.lora.alpha is not None:
                raise ConfigError("lora.modules and lora.alpha are of an adapter: give its rank, e.g. --lora 16")
            return
        option = "--lora" if self.lora.rank is not None else f"--train {self.trained_weights}"
        if self.network != "stdit":
            raise ConfigError(f"{option} is for the diffusion transformer: leave it out, a VAE is trained whole")
        if self.lora.rank is not None and self.trained_weights != "all":
            raise ConfigError("--lora trains an adapter alone, --train the weights of the model: give one")
        if self.init is None:
            raise ConfigError(f"{option} needs a trained model: give it with --init, e.g. --init demo")
        if self.precision == "bf16-weights":
            raise ConfigError(
                f"{option} keeps what it trains in float32: take precision=bf16, with frozen=bf16 for the rest"
            )
        if self.frozen != "fp32" and self.precision != "bf16":
            raise ConfigError(f"frozen={self.frozen} computes in bfloat16: set precision=bf16, not {self.precision}")
        if self.frozen == "int8" and self.lora.rank is None:
            raise ConfigError(f"{option} publishes all weights, which frozen=int8 has rounded: take frozen=bf16")
        if self.sequence > 1 or self.replicate not in (None, 0):
            raise ConfigError(f"{option} keeps a whole model on each process: leave out sequence and replicate")


def model_arguments(config: TrainConfig, latent_channels: int, caption_channels: int) -> dict[str, Any]:
    """Return the constructor arguments of a run's STDiT."""
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
