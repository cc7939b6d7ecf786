"""`stdit plan`, `doctor`, `stages` and the check before a run: they agree; any card; JSON; own settings files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_train.config.load import load_stage, stage_names
from stdit_train.estimate.devices import find_device_kind
from stdit_train.hardware import GIB


def test_doctor_plan_and_the_check_before_a_run_agree(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit_train.hardware.available_memory", lambda: 40 * GIB)
    monkeypatch.setattr("stdit_train.estimate.doctor.available_memory", lambda: 40 * GIB)
    monkeypatch.setattr("stdit_train.estimate.devices.measured_peak", lambda: 1e12)
    examined = json.loads(stdit("doctor", "--json").out)
    found = {stage["stage"]: stage for stage in examined["stages"]}
    assert list(found) == stage_names()
    assert {stage["fits"] for stage in found.values()} == {True, False}
    for name in ("16x256", "64x512", "demo"):
        stage = found[name]
        (planned,) = json.loads(stdit("plan", "--stage", name, "--gpu", "cpu", "--json").out)
        (checked,) = json.loads(stdit("train", "--stage", name, "--dry-run", "--json").out)
        for key in ("fits", "peak_memory", "available_memory", "micro_batch", "parameters"):
            assert stage[key] == planned[key] == checked[key], (name, key)
    told = stdit("doctor").out
    short = [name for name, stage in found.items() if not stage["fits"]]
    assert told.count("a machine with more memory") == len({line for line in told.splitlines() if "for " in line[:4]})
    assert all(f"  {name:<10} needs about " in told for name in short)
    assert all(f"  {name:<10} fits" in told for name in found if name not in short)


def test_advice_is_given_once(stdit: Callable) -> None:
    done = stdit("plan", "--stage", "64x512", "--gpus", "2", "--gpu", "4GB,20TFLOPS")
    assert done.code == 0, done
    assert done.out.count("needs about") == 3  # a copy on each, sharded, two to a clip
    assert done.out.count("a machine with more memory") == 1


def test_no_advice_where_one_of_the_layouts_fits(stdit: Callable) -> None:
    done = stdit("plan", "--stage", "16x256", "--gpus", "8", "--gpu", "24GB,80TFLOPS")
    assert done.code == 0, done
    assert done.out.count("needs about") == 1  # a copy on each
    assert "\nfits\n" in done.out
    assert "to make it fit" not in done.out


def test_any_card(stdit: Callable) -> None:
    done = stdit("plan", "--gpu", "24GB,80TFLOPS", "--json")
    (way,) = json.loads(done.out)
    assert way["device"] == "a card of 24 GB and 80 TFLOP/s"
    assert way["available_memory"] == 23 * GIB
    assert way["seconds_per_step"] == pytest.approx(way["flops_per_step"] / (80e12 * way["share_of_peak"]))
    for name in ("24gb, 80tflops", "24GiB,80T", "24G,80TFLOP/s", "24.0GB,80.0TFLOPS"):
        card = find_device_kind(name)
        assert (card.memory, card.half, card.single) == (23 * GIB, 80e12, 80e12)
    for name in ("24GB", "24GB,80", "80TFLOPS,24GB", "1GB,80TFLOPS", "24GB,0TFLOPS"):
        done = stdit("plan", "--gpu", name)
        assert (done.code, done.err.count("\n")) == (2, 1), name
    assert "e.g. 24GB,80TFLOPS" in stdit("plan", "--gpu", "24GB").err


@pytest.mark.parametrize(("batch", "gpus", "nearest"), [(512, 3, 513), (511, 3, 510), (4, 7, 7), (6, 4, 8)])
def test_the_nearest_batch_is_named(stdit: Callable, batch: int, gpus: int, nearest: int) -> None:
    done = stdit("plan", "--gpus", gpus, "--set", f"global_batch={batch}", "--set", "model.depth=1")
    said = done.err if done.code else done.out  # two to a clip may be a way all the same
    assert f"--set global_batch={nearest}\n" in said, done


def test_ranks_that_cannot_share_a_token_budget(stdit: Callable) -> None:
    settings = ["--set", "data.source=x", "--set", 'data.buckets=["16x256x256"]', "--set", "data.tokens=65536"]
    done = stdit("plan", "--gpus", 6, *settings)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--set data.batch_multiple=6;" in done.err
    done = stdit("plan", "--gpus", 6, *settings, "--set", "data.batch_multiple=6")
    assert "65,536 tokens (12 of 16x256x256)" in done.out
    shared = stdit("plan", "--gpus", 24, *settings, "--set", "sequence=3").out  # 8 ranks of 3
    assert "only ways with several devices to a clip are shown: 24 data-parallel ranks" in shared


def test_stages_as_json(stdit: Callable) -> None:
    listed = json.loads(stdit("stages", "--json").out)
    assert [stage["stage"] for stage in listed["stages"]] == stage_names()
    assert listed["stages"][0]["optimizer"]["lr"] == load_stage(stage_names()[0]).optimizer.lr
    assert "shapes-progressive" in [curriculum["name"] for curriculum in listed["curricula"]]


def test_a_settings_file_of_ones_own(stdit: Callable, tmp_path: Path) -> None:
    """Stage, then file, then options, then --set: the later takes precedence."""
    (tmp_path / "mine.toml").write_text(
        'stage = "16x256"\nsteps = 11\nglobal_batch = 3\nseed = 7\n'
        '[model]\npreset = "S/2"\n[optimizer]\nbetas = [0.8, 0.9]\n'
    )
    asked = ["train", "--config", "mine.toml", "--dry-run", "--json"]
    (shown,) = json.loads(stdit(*asked, "--batch", "5", "--steps", "12", "--set", "steps=13").out)
    settings = shown["settings"]
    assert (settings["stage"], settings["steps"], settings["global_batch"], settings["seed"]) == ("16x256", 13, 5, 7)
    assert (settings["model"]["preset"], settings["optimizer"]["betas"]) == ("S/2", [0.8, 0.9])
    assert settings["optimizer"]["lr"] == load_stage("16x256").optimizer.lr
    (shown,) = json.loads(stdit(*asked, "--stage", "demo").out)
    assert (shown["settings"]["stage"], shown["settings"]["steps"]) == ("demo", 11)
    assert "remove it" in stdit("train", "--config", "mine.toml", "--curriculum", "demo").err
    for text, said in (
        ("stpes = 3", "--config mine.toml: unknown setting 'stpes' (did you mean steps"),
        ("[optimizer]\nlrr = 3", "unknown setting 'optimizer.lrr' (did you mean optimizer.lr"),
        ("steps = ", "--config mine.toml: not a TOML file: Invalid value"),
        ("steps = 'many'", "steps: input should be a valid integer"),
    ):
        (tmp_path / "mine.toml").write_text(text)
        done = stdit(*asked)
        assert (done.code, said in done.err, done.err.count("\n")) == (2, True, 1), done
    assert "--config none.toml: No such file" in stdit("train", "--config", "none.toml").err
