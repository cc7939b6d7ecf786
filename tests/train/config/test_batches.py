"""Batches from a token budget, and the numbers of processes that can share them."""

import re
from dataclasses import replace
from typing import Any

import pytest

from stdit_train.config.batches import check_shared_tokens, clips_per_step, step_batches
from stdit_train.config.load import from_dict, load_stage, parse_overrides, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.dims import parallel_dims
from stdit_train.errors import ConfigError
from stdit_train.estimate.training import batch_words, estimate_run

BUCKETS = ("16x256x256", "16x192x320", "1x512x512")


def budget(tokens: int = 65536, **data: Any) -> TrainConfig:
    config = load_stage("16x256")
    return replace(config, data=replace(config.data, source="x", buckets=BUCKETS, tokens=tokens, **data))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 7, 8, 12, 96])
def test_what_is_said_to_make_ranks_share_a_budget_does(ranks: int) -> None:
    for config in (budget(), budget(20000), budget(batch_multiple=24), budget(400000, batch_multiple=ranks)):
        try:
            check_shared_tokens(config, ranks)
        except ConfigError as error:
            said = parse_overrides(re.findall(r"--set ([^\s;]+)", str(error)))
            assert said and "\n" not in str(error)
            config = from_dict(set_values(to_dict(config), said))
        assert all(clips % ranks == 0 for clips in step_batches(config).values())
        check_shared_tokens(config, ranks)
        assert clips_per_step(config, ranks) % ranks == 0


def test_ranks_that_cannot_share_a_budget_are_told_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_dims(budget(), 6)
    assert str(caught.value) == (
        "6 data-parallel ranks cannot share the 16 clips of 16x256x256 that data.tokens=65536 gives a step: for a new "
        "run --set data.batch_multiple=6; one that has begun goes on with 1 or 2 or 4 or 8 or 16"
    )
    assert parallel_dims(budget(batch_multiple=6), 6).data == 6
    estimate = estimate_run(budget(batch_multiple=6), 2**37, parallel_dims(budget(batch_multiple=6), 6))
    assert estimate.global_batch % 6 == 0
    assert batch_words(estimate) == "65,536 tokens (12 of 16x256x256 or 12 of 16x192x320 or 60 of 1x512x512)"
    with pytest.raises(ConfigError, match=r"12 data-parallel ranks .* --set data.tokens=49152 \(a clip of 16x256x256"):
        parallel_dims(budget(40000, batch_multiple=12), 12)


def test_a_run_from_before_the_multiple_was_a_setting_keeps_its_batches() -> None:
    """A multiple of 8, or 4, 2 or 1 where fewer clips fit."""
    saved = to_dict(budget())
    del saved["data"]["batch_multiple"]
    for clips in range(1, 40):
        config = from_dict(set_values(saved, {"data.tokens": 4096 * clips, "data.buckets": ["16x256x256"]}))
        (batch,) = step_batches(config).values()
        assert batch == (clips // 8 * 8 if clips >= 8 else 1 << (clips.bit_length() - 1))
