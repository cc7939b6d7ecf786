"""The configuration of a training run: frozen dataclasses, stages as TOML, `key=value` overrides.

Sizes are in frames and pixels, times in steps unless a name says otherwise.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import resources
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stdit_model.presets import Variant
from stdit_train.checks import check
from stdit_train.errors import ConfigError as ConfigError  # re-exported: settings and their error go together

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
    activation_checkpointing: Checkpointing = False  # see stdit_train.distributed.parallelize.outfit
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


def stage_names() -> list[str]:
    """The stages that can be trained, the published ones in their order, then the demo."""
    names = [
        path.name.removesuffix(".toml") for path in resources.files("stdit_train.config").joinpath("stages").iterdir()
    ]
    order = ["16x256", "16x256-hq", "16x512", "64x512", "360x512", "demo"]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def load_stage(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of a stage, with overrides of its fields by dotted key.

    Raises:
        ConfigError: no such stage, no such key, or a value of the wrong type.
    """
    return from_dict(set_values(stage_values(name), overrides or {}))


def stage_values(name: str) -> dict[str, Any]:
    """What a stage sets, as nested plain values.

    Raises:
        ConfigError: no such stage.
    """
    if name not in stage_names():
        known = stage_names()
        raise ConfigError(f"unknown stage {name!r}: choose one of {', '.join(known)}{like(name, known)}")
    return {
        "stage": name,
        **tomllib.loads(resources.files("stdit_train.config").joinpath("stages", f"{name}.toml").read_text()),
    }


def set_values(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys in nested plain values, and return these.

    Raises:
        ConfigError: an unknown key; the message names its nearest neighbours.
    """
    for key, value in overrides.items():
        if key not in _keys():
            raise _unknown_key(key)
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return values


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Validate nested plain values.

    Raises:
        ConfigError: the first key that is unknown or has a value of the wrong type.
    """
    try:
        config = TypeAdapter(TrainConfig).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _unknown_key(key) from None
        if first["type"] == "missing":
            raise ConfigError(f"{key} is not set") from None
        raise ConfigError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}") from None
    check(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The opposite of `from_dict`: plain values, fit for JSON."""
    return json.loads(json.dumps(asdict(config)))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings to values, each read as TOML; what is no TOML is a string.

    Raises:
        ConfigError: no "=".
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: expected key=value, for instance optimizer.lr=1e-4")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = value
    return overrides


def _keys(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """Every settable key, dotted."""
    keys = []
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            keys += _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def _unknown_key(key: str) -> ConfigError:
    if "/" in key:
        return ConfigError(f"--set {key}: STAGE/KEY is for the stages of a --schedule; a single stage takes KEY=VALUE")
    return ConfigError(f"unknown setting {key!r}{like(key, _keys()) or '; known are ' + ', '.join(_keys())}")


def like(name: str, known: list[str]) -> str:
    """A question that ends an error, with the nearest of the known names; empty where none is near."""
    leaf = name.split(".")[-1]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [key for key in known if key.split(".")[-1] == leaf and key not in near]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
