"""The batches of a run: how many clips of each shape a step takes, and which numbers of processes can share them."""

import math

from stdit_data.buckets import Bucket, batch_sizes, parse_bucket
from stdit_train.config.schema import DataConfig, TrainConfig
from stdit_train.errors import ConfigError


def own_shape(data: DataConfig) -> Bucket:
    """Return the shape that `data.frames`, `height` and `width` name."""
    return Bucket(data.frames, data.height, data.width)


def step_batches(config: TrainConfig) -> dict[Bucket, int]:
    """Return the clips of a step by their shape: `global_batch`, or as many as fit `data.tokens`.

    Of those that fit, a multiple of `data.batch_multiple` is taken or, where they are fewer, its largest divisor. The
    batches follow from the settings alone, so that a run can be resumed on other numbers of processes.
    """
    data = config.data
    buckets = [parse_bucket(text) for text in data.buckets] or [own_shape(data)]
    if data.tokens is None:
        return dict.fromkeys(buckets, config.global_batch)
    fitting = batch_sizes(buckets, data.tokens)
    return {bucket: _even(clips, data.batch_multiple) for bucket, clips in fitting.items()}


def clips_per_step(config: TrainConfig, ranks: int = 1) -> int:
    """Return the clips of the run's own shape in a step: `global_batch`, or as many as fit `data.tokens`."""
    if config.data.tokens is None:
        return config.global_batch
    return ranks * max(1, config.data.tokens // own_shape(config.data).tokens() // ranks)


def check_shared_tokens(config: TrainConfig, ranks: int) -> None:
    """Check that data-parallel ranks can share the batches of a token budget; nothing is checked without one.

    Raises:
        ConfigError: they cannot; the message says what to set.
    """
    data = config.data
    batches = step_batches(config) if data.tokens is not None else {}
    bucket = next((bucket for bucket, clips in batches.items() if clips % ranks), None)
    if bucket is None or data.tokens is None:
        return
    largest = max(batches, key=Bucket.tokens)
    settings = [] if data.batch_multiple == ranks else [f"--set data.batch_multiple={ranks}"]
    if data.tokens < ranks * largest.tokens():
        settings.append(f"--set data.tokens={ranks * largest.tokens()} (a clip of {largest} has {largest.tokens()})")
    common = math.gcd(*batches.values())
    fitting = " or ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    raise ConfigError(
        f"{ranks} data-parallel ranks cannot share the {batches[bucket]} clips of {bucket} that data.tokens="
        f"{data.tokens} gives a step: for a new run {' '.join(settings)}; one that has begun goes on with {fitting}"
    )


def _even(clips: int, multiple: int) -> int:
    if clips >= multiple:
        return clips // multiple * multiple
    return max(n for n in range(1, clips + 1) if multiple % n == 0)
