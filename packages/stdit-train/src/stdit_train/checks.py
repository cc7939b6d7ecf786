"""Whether the settings of a run make sense, one by one and together."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING

from stdit_data.buckets import parse_bucket
from stdit_data.errors import DataError
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from stdit_train.config.schema import DataConfig, TrainConfig


AT_LEAST_ONE = (
    "steps", "global_batch", "micro_batch", "sequence", "log_every", "validate_every", "sample_every",
    "checkpoint_every", "keep_checkpoints", "keep_every", "max_skipped", "timestep_bins", "model.depth",
    "model.hidden_size", "model.num_heads", "model.model_max_length", "data.frames", "data.height", "data.width",
    "data.clips", "data.interval", "data.tokens", "sampling.steps",
)  # fmt: skip
AT_LEAST_ZERO = (
    "replicate", "profile", "seed", "data.stream", "data.workers", "data.window", "optimizer.lr", "optimizer.muon_lr",
    "optimizer.weight_decay", "optimizer.muon_weight_decay", "optimizer.warmup", "sampling.guidance",
)  # fmt: skip
ABOVE_ZERO = (
    "minutes", "model.space_scale", "model.time_scale", "data.fps", "data.target_fps", "objective.shift",
    "objective.logit_std", "objective.min_snr",
)  # fmt: skip
SHARES = (
    "data.max_reject_share", "data.later", "data.validation", "data.caption_noise", "objective.caption_dropout",
    "objective.given", "optimizer.decay", "optimizer.ema",
)  # fmt: skip


def check(config: TrainConfig) -> None:
    """Looks at what a type alone can't say.

    Raises:
        ConfigError: the first setting that makes no sense; the message names it.
    """
    ranges = (
        (AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
        (AT_LEAST_ZERO, "at least 0", lambda value: 0 <= value < math.inf),
        (ABOVE_ZERO, "a number above 0", lambda value: 0 < value < math.inf),
        (SHARES, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    )
    for keys, expected, fits in ranges:
        for key in keys:
            value = reduce(getattr, key.split("."), config)
            if value is not None and not fits(value):
                raise ConfigError(f"{key} is {value}: expected {expected}")
    if min(config.model.patch_size) < 1:
        raise ConfigError(f"model.patch_size is {list(config.model.patch_size)}: expected three numbers from 1")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas are {list(config.optimizer.betas)}: expected numbers from 0 to below 1")
    if config.objective.min_snr is not None and config.objective.name != "iddpm":
        raise ConfigError("objective.min_snr weights epsilon's error: it goes with objective.name=iddpm only")
    given, data = config.objective, config.data
    if given.given and given.given_of == "later" and data.source == "shapes" and not data.later:
        raise ConfigError("objective.given_of=later: no clip of `shapes` is a later one unless data.later is above 0")
    if not config.optimizer.clip > 0:
        raise ConfigError(f"optimizer.clip is {config.optimizer.clip}: expected a norm above 0 (inf clips nothing)")
    _check_data(config.data)


def _check_data(data: DataConfig) -> None:
    if not 0 <= data.spread <= 0.5:
        raise ConfigError(f"data.spread is {data.spread}: expected 0 (the middle) to 0.5 (anywhere in the frame)")
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
