"""Whether the settings of a run make sense, one by one and together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stdit_data.buckets import parse_bucket
from stdit_data.errors import DataError
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from stdit_train.config import DataConfig, TrainConfig


def check(config: TrainConfig) -> None:
    """Looks at what a type alone can't say.

    Raises:
        ConfigError: the first setting that makes no sense; the message names it.
    """
    positive = {
        "steps": config.steps,
        "global_batch": config.global_batch,
        "data.frames": config.data.frames,
        "data.height": config.data.height,
        "data.width": config.data.width,
        "data.clips": config.data.clips,
        "sampling.steps": config.sampling.steps,
        "log_every": config.log_every,
        "validate_every": config.validate_every,
        "sample_every": config.sample_every,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
        "max_skipped": config.max_skipped,
        "timestep_bins": config.timestep_bins,
        "sequence": config.sequence,
        "micro_batch": 1 if config.micro_batch is None else config.micro_batch,
        "keep_every": 1 if config.keep_every is None else config.keep_every,
    }
    for key, value in positive.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}: expected at least 1")
    for key, value in {"replicate": config.replicate, "profile": config.profile}.items():
        if value < 0:
            raise ConfigError(f"{key} is {value}: expected at least 0")
    if config.objective.min_snr is not None and config.objective.name != "iddpm":
        raise ConfigError("objective.min_snr weights epsilon's error: it goes with objective.name=iddpm only")
    given, data = config.objective, config.data
    if given.given and given.given_of == "later" and data.source == "shapes" and not data.later:
        raise ConfigError("objective.given_of=later: no clip of `shapes` is a later one unless data.later is above 0")
    if config.optimizer.clip <= 0:
        raise ConfigError(f"optimizer.clip is {config.optimizer.clip}: expected a norm above 0 (inf clips nothing)")
    _check_data(config.data)
    for key, share in (
        ("data.max_reject_share", config.data.max_reject_share),
        ("objective.caption_dropout", config.objective.caption_dropout),
        ("objective.given", config.objective.given),
        ("data.later", config.data.later),
        ("data.validation", config.data.validation),
        ("data.caption_noise", config.data.caption_noise),
        ("optimizer.decay", config.optimizer.decay),
        ("optimizer.ema", config.optimizer.ema),
    ):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"{key} is {share}: expected a number from 0 to 1")


def _check_data(data: DataConfig) -> None:
    least = {"data.interval": (data.interval, 1), "data.stream": (data.stream, 0), "data.tokens": (data.tokens, 1)}
    for key, (value, low) in least.items():
        if value is not None and value < low:
            raise ConfigError(f"{key} is {value}: expected at least {low}")
    if not 0 <= data.spread <= 0.5:
        raise ConfigError(f"data.spread is {data.spread}: expected 0 (the middle) to 0.5 (anywhere in the frame)")
    if data.target_fps is not None and not 0 < data.target_fps < math.inf:
        raise ConfigError(f"data.target_fps is {data.target_fps}: expected a rate above 0")
    for bucket in data.buckets:
        try:
            parse_bucket(bucket)
        except DataError as error:
            raise ConfigError(f"data.buckets: {error}") from None
    if data.tokens is not None and not data.buckets:
        raise ConfigError("data.tokens shares a step out to data.buckets: name these too, or set global_batch instead")
    if data.validation == 1.0:
        raise ConfigError("data.validation is 1: nothing would be left to train on")
    if data.validation and data.validation_source is not None:
        raise ConfigError(
            "data.validation holds clips out of data.source, data.validation_source names others: set one"
        )
    if data.source == "shapes" and (data.validation or data.validation_source is not None):
        raise ConfigError("data.validation and data.validation_source are for videos: `shapes` has validation clips")
    if data.source == "shapes" and data.buckets:
        raise ConfigError("data.buckets are for videos (--data): `shapes` is drawn at one size")
