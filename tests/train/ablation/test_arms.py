"""What is compared: arms, matching, the common start, the budget."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stdit_train.ablation.arms import Arm, Study, estimate_arm, loss_is_comparable, make_arms, parse_vary, reference_arm
from stdit_train.ablation.costs import Cost, study_seconds
from stdit_train.ablation.matching import share_initial_weights, with_length, with_parameters_matched
from stdit_train.config.load import ConfigError, load_stage
from stdit_train.config.schema import LoRAConfig, TrainConfig
from stdit_train.distributed.parallelize import build_model

FOUR = ["dit", "seq", "parallel", "latte"]


@pytest.fixture
def base(parts) -> TrainConfig:  # type: ignore[no-untyped-def]
    return load_stage("demo", {"data.vae": str(parts), "data.text_encoder": str(parts)})


def study(base: TrainConfig, arms: list[Arm], **settings: Any) -> Study:
    defaults: dict[str, Any] = {"seeds": 1, "match": "steps", "steps": None, "minutes": None, "prompts": 5, "given": {}}
    return Study(base=base, arms=arms, **defaults | settings)


def test_values_are_read_as_toml() -> None:
    assert parse_vary("objective.name=iddpm,flow") == ("objective.name", ["iddpm", "flow"])
    assert parse_vary("model.patch_size=[1,2,2],[2,2,2]") == ("model.patch_size", [[1, 2, 2], [2, 2, 2]])
    assert parse_vary("objective.caption_dropout=0.0, 0.1,0.1") == ("objective.caption_dropout", [0.0, 0.1])


@pytest.mark.parametrize(
    ("text", "word"), [("objective.name", "key=a,b,c"), ("optimizer.lr=1", "two"), ("seed=1,2", "--seeds")]
)
def test_what_can_not_be_varied(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_vary(text)


def test_only_whole_models_are_compared(base: TrainConfig) -> None:
    arms = make_arms(base, ["seq", "dit"], [])
    for settings in ({"trained_weights": "temporal"}, {"lora": LoRAConfig(4)}):
        with pytest.raises(ConfigError, match=r"leave out lora\.rank and trained_weights"):
            study(replace(base, init="demo", **settings), arms)


def test_arms_are_every_combination(base: TrainConfig) -> None:
    arms = make_arms(base, ["seq"], [parse_vary("model.patch_size=[1,2,2],[2,2,2]")])
    assert [arm.name for arm in arms] == ["patch_size=1x2x2", "patch_size=2x2x2"]
    arms = make_arms(base, ["dit", "seq"], [parse_vary("objective.name=iddpm,flow")])
    assert [arm.name for arm in arms] == ["dit-name=iddpm", "dit-name=flow", "seq-name=iddpm", "seq-name=flow"]
    assert not loss_is_comparable(base, arms)
    for key, near in {
        "objective.nam": "objective.name",
        "lr": "optimizer.lr",
        "learning_rate": "optimizer.lr",
        "patch": "model.patch_size",
    }.items():
        with pytest.raises(ConfigError, match=f"^--vary {key}: unknown setting '{key}' .did you mean {near}"):
            make_arms(base, ["seq"], [(key, ["a", "b"])])


@pytest.mark.parametrize("variant", FOUR)
def test_parameters_are_matched(base: TrainConfig, variant: str) -> None:
    arms = make_arms(base, ["dit", "seq", "parallel", "latte"], [])
    reference = reference_arm(base, arms)
    assert reference.name == "seq"
    target = estimate_arm(reference.config(base)).parameters
    arm = with_parameters_matched(next(arm for arm in arms if arm.name == variant), base, target)
    assert estimate_arm(arm.config(base)).parameters == pytest.approx(target, rel=0.05)


def test_all_flops_are_matched(base: TrainConfig) -> None:
    arms = make_arms(base, ["dit", "seq", "latte"], [])
    arms = with_length(study(base, arms, match="flops", steps=1000), arms, None, {})
    spent = [arm.settings["steps"] * estimate_arm(arm.config(base)).step_flops for arm in arms]
    assert max(spent) / min(spent) < 1.01
    assert arms[1].settings["steps"] == 1000


def test_steps_fit_the_budget(base: TrainConfig) -> None:
    """Two arms of 0.1 and 0.3 s a step, 4 s a run besides: 90 % of 60 s, less 8 s, are 115 steps of both."""
    arms = make_arms(base, ["dit", "seq"], [])
    costs = {"dit": Cost(0.3, 0.0, 0.0, 0.0, 1.0, 0.5), "seq": Cost(0.1, 0.0, 0.0, 0.0, 1.0, 0.5)}
    planned = with_length(study(base, arms, minutes=1.0), arms, 1.0, costs)
    assert [arm.settings["steps"] for arm in planned] == [115, 115]
    timed = with_length(study(base, arms, match="time", minutes=1.0), arms, 1.0, costs)
    assert [arm.settings["steps"] for arm in timed] == [77, 230]  # 23 s each
    assert "minutes" not in timed[0].settings  # how fast the machine is during a run does not decide on its length
    short = with_length(study(base, arms, minutes=0.01), arms, 0.01, costs)
    assert [arm.settings["steps"] for arm in short] == [20, 20]


def test_the_time_of_a_study(base: TrainConfig) -> None:
    """Of each run: 11 validations, 4 + 2 * 5 videos, 6 times saving; and each clip once for all arms of a seed."""
    arms = make_arms(base, ["dit", "seq"], [])
    costs = {"dit": Cost(0.3, 0.01, 0.02, 0.004, 1.0, 0.5), "seq": Cost(0.1, 0.01, 0.02, 0.001, 1.0, 0.5)}
    run = 1.0 + 11 * 0.01 + 14 * 0.02 + 6 * 0.5
    wanted = 2 * (2 * run + 100 * 0.4 + 100 * base.global_batch * 0.004)
    asked = study(base, arms, seeds=2, steps=100)
    assert study_seconds(asked, {"dit": 100, "seq": 100}, costs) == pytest.approx(wanted)
    assert study_seconds(asked, {}, costs) == 0.0


def test_the_start_is_the_same_wherever_parameters_are(base: TrainConfig) -> None:
    """All arms, with another patch and another depth among them, whichever is trained first."""
    small = replace(base, model=replace(base.model, hidden_size=16, depth=2))
    arms = make_arms(small, ["dit", "seq", "latte"], [parse_vary("model.patch_size=[1,2,2],[2,2,2]")])
    arms += [replace(arms[0], name="deep", settings={**arms[0].settings, "model.depth": 3})]
    configs = [arm.config(small, 5) for arm in arms]
    made = [
        share_initial_weights(build_model(config, 4, 64) for config in configs[: i + 1]) for i in range(len(configs))
    ]
    starts: dict = {}
    for model, _ in made:
        for name, value in model.state_dict().items():
            known = starts.setdefault((name, value.shape), value)
            assert torch.equal(known, value), name
    assert made[0][1] == 1.0
    assert 0.5 < made[2][1] < 1.0  # seq has the temporal attention besides
    other = share_initial_weights([build_model(arms[0].config(small, 6), 4, 64)])
    assert not torch.equal(other[0].x_embedder.proj.weight, made[0][0].x_embedder.proj.weight)
