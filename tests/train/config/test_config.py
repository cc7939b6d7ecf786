"""Stages, overrides, and what a wrong one says."""

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from stdit_train.config.load import from_dict, load_stage, parse_overrides, set_values, stage_names, to_dict
from stdit_train.errors import ConfigError


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
        ({"steps": 0}, "steps: input should be greater than or equal to 1, not 0"),
        ({"model.variant": "dot"}, "model.variant"),
        (
            {"objective.caption_dropout": 1.5},
            "objective.caption_dropout: input should be less than or equal to 1, not 1.5",
        ),
        ({"data": 3}, "unknown setting 'data'"),
        ({"minutes": 0}, "minutes: input should be greater than 0, not 0"),
        ({"optimizer.lr": math.nan}, "optimizer.lr: input should be a finite number, not nan"),
        ({"optimizer.betas": [1.5, 0.9]}, "optimizer.betas: input should be less than 1, not 1.5"),
        ({"optimizer.clip": math.nan}, "optimizer.clip: input should be greater than 0, not nan"),
        ({"model.num_heads": 0}, "model.num_heads: input should be greater than or equal to 1, not 0"),
        ({"model.patch_size": [1, 0, 2]}, "model.patch_size: input should be greater than or equal to 1, not 0"),
        ({"model.space_scale": 0}, "model.space_scale: input should be greater than 0, not 0"),
        ({"data.fps": 0}, "data.fps: input should be greater than 0, not 0"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing: "),
        ({"objective.min_snr": 5}, "objective.min_snr needs objective.name=iddpm, not flow"),
        ({"data.buckets": ["16x64"]}, "data.buckets: bucket '16x64'"),
        ({"sampling.guidance": math.nan}, "sampling.guidance: input should be a finite number, not nan"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_stage("demo", overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_spans_settings_is_checked_whoever_sets_them() -> None:
    config = load_stage("demo")
    with pytest.raises(ConfigError, match=r"data\.buckets are for videos"):
        replace(config.data, buckets=("16x64x64",))


def test_old_names_are_told_and_read(caplog: pytest.LogCaptureFixture) -> None:
    overrides = parse_overrides(["objective.given=0.5", "8x32/data.remember_latents=false"])
    assert overrides == {"objective.conditioning_share": 0.5, "8x32/data.cache_latents": False}
    assert [record.getMessage() for record in caplog.records] == [
        "--set objective.given: use objective.conditioning_share; the old name will be removed in 0.3",
        "--set data.remember_latents: use data.cache_latents; the old name will be removed in 0.3",
    ]


def test_settings_saved_by_an_older_version() -> None:
    """With keys of then, and with the absolute path of the demo model in a clone that is gone."""
    config = load_stage("demo", {"objective.conditioning_share": 0.5, "data.later": 0.5})
    saved = to_dict(config)
    saved["objective"]["given"] = saved["objective"].pop("conditioning_share")
    saved["objective"]["given_of"] = saved["objective"].pop("conditioning_clips")
    saved["data"]["remember_latents"] = saved["data"].pop("cache_latents")
    saved["trains"] = saved.pop("network")
    saved["data"]["vae"] = "/gone/packages/stdit-cli/src/stdit_cli/assets/demo"
    before = json.dumps(saved)
    assert from_dict(saved) == config
    changed = from_dict(set_values(saved, {"objective.given": 0.25}))
    assert (changed.objective.conditioning_share, changed.data.vae) == (0.25, "demo")
    assert json.dumps(saved) == before  # the caller's values stay as they are


def test_importing_settings_does_not_import_torch() -> None:
    """A mistyped setting is told before torch is loaded."""
    script = """
        import sys
        import stdit_train.config.resolve
        from stdit_train.config.load import load_stage
        from stdit_train.curriculum import TrainOptions, find_run
        from pathlib import Path
        find_run(TrainOptions(stage="16x256", out=Path("run")))
        try:
            load_stage("demo", {"optimizer.lrr": 1})
        except ValueError as error:
            print(error)
        print({"torch", "numpy", "diffusers", "transformers", "pyarrow"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("unknown setting 'optimizer.lrr' (did you mean optimizer.lr")
    assert done.stdout.splitlines()[1] == "set()"


def test_an_unknown_stage_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown stage '64x51': .*64x512"):
        load_stage("64x51")


def test_a_setting_without_value() -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides(["steps"])
