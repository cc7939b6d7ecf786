"""`stdit ablate`: the same start and data, resuming, the report; what a user can get wrong."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_train.tracking.metrics import read_metrics

TINY = ["--set", "global_batch=2", "--set", "data.clips=4", "--set", "data.frames=4", "--set", "sampling.steps=2"]
TINY += ["--set", "data.height=32", "--set", "data.width=32", "--set", "model.depth=1", "--set", "model.hidden_size=32"]
TINY += ["--set", "log_every=1"]
# Otherwise such short runs validate, save and plot after every step.
AT_THE_END = [*TINY, "--set", "validate_every=1000", "--set", "checkpoint_every=1000"]


def test_arms_are_compared_resumed_and_reported(stdit: Callable, tmp_path: Path) -> None:
    command = [
        "ablate",
        "--variants",
        "seq,dit",
        "--steps",
        "3",
        "--seeds",
        "2",
        "--prompts",
        "1",
        *TINY,
        "--out",
        "abl",
    ]
    done = stdit(*command)
    assert done.code == 0, done
    folder = tmp_path / "abl"
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [("dit", "0"), ("seq", "0"), ("dit", "1"), ("seq", "1")]
    assert all(float(row["seen_all"]) == 0 for row in rows)  # three steps
    page = (folder / "report.html").read_text()
    line = "No ranking: after 3 steps none of the 8 scored videos shows what its prompt says."
    assert line in page and line in done.out
    assert "For a ranking: --seeds 3 --steps 4000 in another --out folder, about " in done.out
    assert "<h2>No ranking</h2>" in page and "~" not in done.out and "not separated" not in page
    assert page.count("data:image/png;base64") == 1
    assert not (folder / "final.png").exists()
    costs = json.loads((folder / "ablation.json").read_text())["costs"]
    assert {float(row["seconds_per_step"]) for row in rows if row["arm"] == "seq"} == {round(costs["seq"]["step"], 4)}
    assert "4 runs of 3 steps: about" in done.out and "measured in turns: dit 0." in done.out
    assert re.search(r"^\S+ (seconds|minutes) \(estimated: \S+ (seconds|minutes)\)$", done.out, re.M)
    assert "(estimated: " in page

    scores = folder / "dit-seed0" / "scores.json"  # as if training had been longer
    scores.write_text(scores.read_text().replace('"share": 0.0', '"share": 1.0'))
    done = stdit(*command)
    assert done.code == 0, done
    assert "measured in turns" not in done.out  # nothing is left to do
    with (folder / "differences.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert {pair["measure"] for pair in pairs} == {"validation loss", "seen", "held-out"}
    losses = {(row["arm"], row["seed"]): float(row["validation_loss"]) for row in rows}
    pair = pairs[0]
    mean = sum(losses[pair["better"], seed] - losses[pair["worse"], seed] for seed in "01") / 2
    assert float(pair["difference"]) == pytest.approx(mean, abs=2e-6)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert page.count("data:video/mp4;base64") == 2 * 4  # four prompts of each arm
    assert 'src="http' not in page and "<link" not in page  # nothing to be fetched
    assert "not separated" in page
    for name in ("curves.png", "final.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    # Models begin by predicting zero, so the first loss tells clips, noise and timesteps alone.
    first = {
        run: read_metrics(folder / run / "metrics.jsonl")[0]["loss"] for run in ("dit-seed0", "seq-seed0", "dit-seed1")
    }
    assert first["dit-seed0"] == first["seq-seed0"] != first["dit-seed1"]

    before = (folder / "seq-seed0" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(folder / "dit-seed1")  # as if it had not been reached yet
    settings = json.loads((folder / "seq-seed0" / "config.json").read_text())
    assert (settings["data"]["vae"], settings["data"]["text_encoder"]) == ("demo", "demo")
    settings["data"]["vae"] = "/another/clone/src/stdit_cli/assets/demo"  # as older versions saved it
    (folder / "seq-seed0" / "config.json").write_text(json.dumps(settings))
    assert stdit(*command).code == 0
    assert (folder / "seq-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    with (folder / "runs.csv").open() as file:
        again = {(row["arm"], row["seed"]): float(row["validation_loss"]) for row in csv.DictReader(file)}
    assert again == losses  # the run that was made anew came to the same

    done = stdit(*command, "--set", "optimizer.lr=1e-4")
    assert (done.code, "other settings (optimizer.lr: 0.003, now 0.0001)" in done.err) == (2, True), done
    done = stdit(*command, "--match", "flops")
    assert (done.code, "match: steps, now flops" in done.err) == (2, True), done


@pytest.mark.slow
def test_the_reference_is_the_same_run_whatever_it_is_matched_to(stdit: Callable, tmp_path: Path) -> None:
    """The other arms don't decide on its start, so that it may be copied from one ablation to another."""
    losses = {}
    for name, variants, match in (("a", "seq,dit", "steps"), ("b", "seq,dit,latte", "parameters")):
        tiny = [*AT_THE_END, "--set", "model.depth=2"]
        command = ["ablate", "--variants", variants, "--match", match, "--steps", "2", "--prompts", "0"]
        done = stdit(*command, *tiny, "--out", name)
        assert done.code == 0, done
        losses[name] = [row.get("loss") for row in read_metrics(tmp_path / name / "seq-seed0" / "metrics.jsonl")]
    assert losses["a"] == losses["b"]
    shutil.rmtree(tmp_path / "b" / "seq-seed0")
    shutil.copytree(tmp_path / "a" / "seq-seed0", tmp_path / "b" / "seq-seed0")
    assert stdit(*command, *tiny, "--out", "b").code == 0


def test_an_arm_that_diverges_does_not_stop_the_others(stdit: Callable, tmp_path: Path) -> None:
    options = ["--variants", "seq", "--vary", "optimizer.lr=1e38,1e-3,1e-4", "--set", "optimizer.name=adamw"]
    options += ["--set", "max_skipped=2", "--steps", "8", "--seeds", "2", "--prompts", "0", *AT_THE_END]
    done = stdit("ablate", *options, "--out", "abl")
    assert done.code == 0, done
    assert "lr=1e+38-seed0: diverged, 2 steps before" in done.out
    assert "Not ranked: lr=1e+38, which diverged in 2 of 2 runs." in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("by validation loss")]
    assert "lr=1e+38" not in line and "lr=0.001" in line and "lr=0.0001" in line
    page = (tmp_path / "abl" / "report.html").read_text()
    assert "Not ranked: lr=1e+38" in page and "measure different things" not in page
    before = (tmp_path / "abl" / "lr=1e+38-seed0" / "metrics.jsonl").read_bytes()
    assert stdit("ablate", *options, "--out", "abl").code == 0  # typed again, it is not tried again
    assert (tmp_path / "abl" / "lr=1e+38-seed0" / "metrics.jsonl").read_bytes() == before

    alone = ["--variants", "seq", "--vary", "optimizer.lr=1e38,2e38", *options[4:]]
    done = stdit("ablate", *alone, "--out", "alone")
    assert (done.code, "diverged in 2 of 2 runs" in done.out) == (0, True), done


def test_a_quick_look_says_so_and_plans_its_steps(stdit: Callable, tmp_path: Path) -> None:
    options = ["--vary", "objective.caption_dropout=0.0,0.5", "--quick", "--minutes", "0.1", "--prompts", "0"]
    done = stdit("ablate", *options, *TINY, "--out", "abl")
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == "a quick look, not a ranking"
    assert "…" not in done.out  # tables that fit into 80 columns
    assert "2 runs of" in done.out and "of the 4,000 steps of stage demo: this shows that all arms train" in done.out
    plan = json.loads((tmp_path / "abl" / "ablation.json").read_text())
    assert set(plan["arms"]) == {"caption_dropout=0.0", "caption_dropout=0.5"}
    assert len({arm["steps"] for arm in plan["arms"].values()}) == 1
    assert "a quick look, not a ranking" in (tmp_path / "abl" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--match", "speed"], ["--match speed", "parameters"]),
        (["--vary", "objective.name"], ["key=a,b,c"]),
        (["--vary", "objective.nam=iddpm,flow"], ["--vary objective.nam", "did you mean objective.name"]),
        (["--vary", "learning_rate=1e-3,1e-4"], ["--vary learning_rate", "did you mean optimizer.lr?"]),
        (["--vary", "objective.name=iddpm,flaw"], ["objective.name", "flow"]),
        (["--set", "seed=3"], ["--seeds"]),
        (["--steps", "5", "--minutes", "1"], ["--steps", "--minutes"]),
    ],
)
def test_what_can_be_mistyped(stdit: Callable, tmp_path: Path, options: list[str], words: list[str]) -> None:
    done = stdit("ablate", *options)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
    assert not (tmp_path / "runs").exists()
