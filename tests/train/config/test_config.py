"""Stages, overrides, and what a wrong one says."""

import math

import pytest

from stdit_train.config.load import ConfigError, from_dict, load_stage, parse_overrides, stage_names, to_dict


def test_the_published_stages() -> None:
    assert stage_names()[:6] == [
        "16x256",
        "16x256-hq",
        "16x512",
        "64x512",
        "360x512",
        "demo",
    ]  # ones of your own follow
    stages = {name: load_stage(name) for name in stage_names()}
    for name in stage_names()[:5]:
        c = stages[name]
        assert (c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay) == ("adamw", 2e-5, 0.0)
        assert (c.optimizer.clip, c.optimizer.ema, c.precision) == (1.0, 0.9999, "bf16")
        assert (c.objective.name, c.objective.caption_dropout) == ("iddpm", 0.1)
        assert (c.sampling.steps, c.sampling.guidance) == (100, 7.0)
    published = {
        name: (c.data.frames, c.data.height, c.data.interval, c.data.fps, c.model.space_scale, c.global_batch)
        for name, c in stages.items()
    }
    assert published["16x256"] == (16, 256, 3, 8.0, 0.5, 512)
    assert published["16x256-hq"] == (16, 256, 3, 8.0, 0.5, 512)
    assert published["16x512"] == (16, 512, 3, 8.0, 1.0, 512)
    assert published["64x512"] == (64, 512, 2, 12.0, 1.0, 256)
    assert [stages[name].activation_checkpointing for name in stage_names()[:5]] == [True, True, False, True, True]
    assert [stages[name].steps for name in stage_names()[:3]] == [80_000, 24_000, 20_000]
    assert stages["64x512"].model.time_scale == pytest.approx(2 / 3)


def test_round_trip_through_json() -> None:
    config = load_stage("demo", {"model.patch_size": [2, 2, 2]})
    assert from_dict(to_dict(config)) == config


def test_overrides_are_toml_or_text() -> None:
    parsed = parse_overrides(["optimizer.lr=1e-4", "data.flip=true", "model.variant=dit", "model.patch_size=[2,2,2]"])
    config = load_stage("16x256", parsed)
    assert (config.optimizer.lr, config.data.flip, config.model.variant) == (1e-4, True, "dit")
    assert config.model.patch_size == (2, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"optimizer.learning_rat": 1}, "unknown setting 'optimizer.learning_rat'"),
        ({"optimiser.lr": 1}, "optimizer.lr"),
        ({"lr": 1}, "optimizer.lr"),
        ({"steps": "many"}, "steps: "),
        ({"steps": 0}, "steps is 0"),
        ({"model.variant": "dot"}, "model.variant"),
        ({"objective.caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"data": 3}, "unknown setting 'data'"),
        ({"minutes": 0}, "minutes is 0"),
        ({"optimizer.lr": math.nan}, "optimizer.lr is nan: expected at least 0"),
        ({"optimizer.betas": [1.5, 0.9]}, "optimizer.betas are"),
        ({"optimizer.clip": math.nan}, "optimizer.clip is nan"),
        ({"model.num_heads": 0}, "model.num_heads is 0"),
        ({"model.patch_size": [1, 0, 2]}, "model.patch_size is"),
        ({"model.space_scale": 0}, "model.space_scale is 0"),
        ({"data.fps": 0}, "data.fps is 0"),
        ({"sampling.guidance": math.nan}, "sampling.guidance is nan"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s).*" + said.replace("(", r"\(")):
        load_stage("demo", overrides)


def test_an_unknown_stage_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown stage '64x51': .*64x512"):
        load_stage("64x51")


def test_a_setting_without_value() -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides(["steps"])
