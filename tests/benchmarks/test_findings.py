"""benchmarks/findings/run.py: what it concludes from made-up results, what it skips, and its image weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from stdit_data.datasets.noisy_captions import NoisyCaptions
from stdit_data.datasets.shapes import ShapesDataset
from stdit_model import STDiT
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "findings"


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import run as findings

    return findings


def made(arm: str, seed: int, loss: float | None, share: float | None, **more: Any) -> dict[str, Any]:
    """A result file's content."""
    shares = {} if share is None else {s: dict.fromkeys(("all", "colour", "shape", "motion"), share) for s in ("seen",)}
    return {
        "arm": arm,
        "seed": seed,
        "about": f"what {arm} is",
        "steps": [10],
        "flops": 2_000_000_000_000,
        "tokens": 3_000_000,
        "seconds": 30.0,
        "validation_loss": loss,
        "curve": [],
        "shares": shares,
        "skipped": 0,
        "ended": None,
        "machine": "a machine",
        "written": "2026-01-01",
        "settings": [],
        "prompts": 40,
        **more,
    }


def written(folder: Path, results: Mapping[str, list[tuple[float | None, float | None]]], **more: Any) -> Path:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for arm, values in results.items():
        for seed, (loss, share) in enumerate(values):
            file = folder / "results" / f"{arm}-seed{seed}.json"
            file.write_text(json.dumps(made(arm, seed, loss, share, **more)))
    return folder


def part(page: str, title: str) -> str:
    """A section of the page."""
    return next(text for text in page.split("\n## ") if text.startswith(title))


def reported(findings: ModuleType, folder: Path) -> str:
    assert findings.main(["report", str(folder), "--out", str(folder / "out.md")]) == 0
    return (folder / "out.md").read_text()


def test_a_difference_that_the_seeds_tell_apart(findings, tmp_path: Path) -> None:
    base = [(0.50, 0.5), (0.60, 0.6), (0.70, 0.7)]
    worse = [(0.61, 0.4), (0.70, 0.5), (0.81, 0.6)]  # differences 0.11, 0.10, 0.11: the seeds' spread cancels
    page = reported(findings, written(tmp_path, {"base": base, "noisy": worse}))
    text = part(page, "Noisy captions")
    # mean 0.106667; t(2) = 4.302653; deviation 0.0057735; half = 4.302653 * 0.0057735 / sqrt(3) = 0.014342
    assert "| noisy - base | validation loss | +0.1067 ± 0.0143 | 3 | worse |" in text
    assert "| noisy - base | all correct, seen | -0.1000 ± 0.0000 | 3 | worse |" in text
    assert "worse by validation loss (+0.1067 ± 0.0143)" in text
    assert "Noisy captions against clean ones: **worse, as expected** (" in text
    assert "| base | what base is | 3 | 10 | 2.00 | 3.00 | 0.6000 (0.5000 to 0.7000) | 0.60 (0.50 to 0.70) |" in text


def test_the_other_way_is_said_as_well(findings, tmp_path: Path) -> None:
    page = reported(findings, written(tmp_path, {"base": [(0.6, None)] * 3, "noisy": [(0.5, None)] * 3}))
    text = part(page, "Noisy captions")
    assert "| noisy - base | validation loss | -0.1000 ± 0.0000 | 3 | better |" in text
    assert "Noisy captions against clean ones: **better, against the expectation** (" in text


def test_what_the_seeds_do_not_tell_apart(findings, tmp_path: Path) -> None:
    base, noisy = [(0.5, 0.5), (0.6, 0.5), (0.7, 0.5)], [(0.7, 0.6), (0.6, 0.4), (0.5, 0.5)]
    text = part(reported(findings, written(tmp_path, {"base": base, "noisy": noisy})), "Noisy captions")
    assert text.count("| not distinguishable |") == 3
    assert "Noisy captions against clean ones: **not distinguishable here** (" in text


def test_measures_that_disagree(findings, tmp_path: Path) -> None:
    base, noisy = [(0.5, 0.5)] * 3, [(0.6, 0.7)] * 3
    text = part(reported(findings, written(tmp_path, {"base": base, "noisy": noisy})), "Noisy captions")
    assert "Noisy captions against clean ones: **the measures disagree** (" in text


def test_one_seed_concludes_nothing(findings, tmp_path: Path) -> None:
    text = part(reported(findings, written(tmp_path, {"base": [(0.5, 0.5)], "noisy": [(0.9, 0.1)]})), "Noisy captions")
    assert "one seed, no interval" in text
    assert text.rstrip().endswith("Noisy captions against clean ones: one seed, so no conclusion.")


def test_losses_of_two_objectives_are_not_compared(findings, tmp_path: Path) -> None:
    folder = written(tmp_path, {"base": [(0.5, 0.8)] * 3, "iddpm": [(0.1, 0.2)] * 3})
    text = part(reported(findings, folder), "iDDPM")
    assert "| iddpm - base | all correct, seen | -0.6000 ± 0.0000 | 3 | worse |" in text
    assert "| validation loss |" not in text
    assert "iDDPM with three times the steps against rectified flow: not run yet." in text


def test_runs_that_broke_off(findings, tmp_path: Path) -> None:
    written(tmp_path, {"base": [(0.5, 0.5)] * 3})
    folder = written(tmp_path, {"rate-x25": [(None, None)] * 3}, ended="10 steps in a row were not finite", skipped=10)
    text = part(reported(findings, folder), "A learning rate")
    assert "30 steps skipped; 3 of 3 ended early: not finite" in text
    assert "Twenty-five times the learning rate: 3 of 3 runs of rate-x25 ended early, not finite." in text


def test_nothing_run_yet(findings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    page = reported(findings, tmp_path)
    assert page.count("Not run yet") == page.count("\n## ") == len(findings.QUESTIONS)
    assert findings.main(["report", str(tmp_path / "none")]) == 2
    assert "no finished runs" in capsys.readouterr().err


def test_arms_have_equal_compute(findings) -> None:
    arms = findings.make_arms(findings.MINUTES)
    flops = {name: arm.flops for name, arm in arms.items()}
    assert flops["patch-222"] == pytest.approx(flops["base"], rel=0.01)
    assert flops["latte"] == pytest.approx(flops["base"], rel=0.01)
    assert flops["last-stage"] == pytest.approx(flops["progressive"], rel=0.01)
    assert flops["image"] + flops["seq-image"] == pytest.approx(flops["base"], rel=0.01)
    assert flops["image"] + flops["latte-image"] == pytest.approx(flops["latte"], rel=0.01)
    assert arms["patch-222"].tokens == pytest.approx(arms["base"].tokens, rel=0.1)
    for question in findings.QUESTIONS:
        assert set(question.arms) <= set(arms)


def test_finished_runs_are_skipped_and_others_refused(findings, tmp_path: Path, capsys, monkeypatch) -> None:
    question = next(question for question in findings.QUESTIONS if question.name == "captions")
    arms = findings.make_arms(0.1)
    (tmp_path / "results").mkdir()
    for name in question.arms:
        settings = [findings.to_dict(config) for config in arms[name].seeded(0)]
        content = made(name, 0, 0.5, 0.5, settings=settings)
        (tmp_path / "results" / f"{name}-seed0.json").write_text(json.dumps(content))
    monkeypatch.setattr(findings.Findings, "_train", lambda *_: pytest.fail("trained again"))
    asked = [str(tmp_path), "--only", "captions", "--seeds", "1"]
    assert findings.main([*asked, "--minutes", "0.1"]) == 0
    assert findings.main([*asked, "--minutes", "5"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert findings.main([*asked, "--minutes", "0.1", "--prompts", "7"]) == 2
    assert "give --prompts 40" in capsys.readouterr().err


def test_image_weights_give_each_frame_what_the_image_model_gives(findings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 4, "caption_channels": 16, "model_max_length": 8}
    image = STDiT(variant="dit", learn_sigma=False, **sizes)
    for parameter in image.parameters():  # what starts at zero would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    run = RunFolder(tmp_path)
    image.save_pretrained(run.pipeline / "transformer")
    video = STDiT(variant="seq", learn_sigma=False, **sizes)
    assert "image model" in load_initial(video, str(findings.pixart_file(run)))
    x, y, timestep = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 8, 16), torch.tensor([100.0, 900.0])
    with torch.no_grad():
        frames = [image(x[:, :, t : t + 1], timestep, y) for t in range(3)]
        torch.testing.assert_close(video(x, timestep, y), torch.cat(frames, dim=2), atol=1e-5, rtol=1e-4)


def test_noisy_captions_are_known_without_drawing() -> None:
    clean = ShapesDataset(frames=1, height=16, width=16, length=60)
    noisy = NoisyCaptions(clean, 0.5, seed=1)
    captions = [noisy.caption(i) for i in range(60)]
    assert captions == [noisy.load(i, seed=0, epoch=0).caption for i in range(60)]
    wrong = np.mean([caption != clean.caption(i) for i, caption in enumerate(captions)])
    assert 0.3 < wrong < 0.7
    assert noisy.settings() != clean.settings()
    assert [NoisyCaptions(clean, 0.0, seed=1).caption(i) for i in range(9)] == [clean.caption(i) for i in range(9)]


@pytest.mark.slow
def test_end_to_end_and_resumed(findings, tmp_path: Path) -> None:
    asked = [str(tmp_path), "--only", "image", "captions", "precision", "--seeds", "1", "--minutes", "0.1"]
    asked += ["--prompts", "2"]
    assert findings.main(asked) == 0
    files = sorted((tmp_path / "results").iterdir())
    assert len(files) == 9
    before = {file: file.stat().st_mtime_ns for file in files}
    noisy = tmp_path / "results" / "noisy-seed0.json"
    first = json.loads(noisy.read_text())
    noisy.unlink()  # as if killed before it was written
    assert findings.main(asked) == 0
    again = json.loads(noisy.read_text())
    assert (again["validation_loss"], again["shares"]) == (first["validation_loss"], first["shares"])
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items() if file != noisy)
    assert "3-D patches" in reported(findings, tmp_path)


def test_the_page_names_the_commands_that_made_the_runs(findings, tmp_path: Path) -> None:
    usual = [(0.5, 0.5)] * 3
    page = reported(findings, written(tmp_path / "a", {"base": usual}, steps=[700]))
    assert f"findings/run.py {tmp_path / 'a'}\n" in page
    assert "--minutes" not in page
    folder = written(tmp_path / "b", {"base": usual[:2]}, steps=[1400], prompts=100)
    written(folder, {"demo-flow": usual[:1]}, steps=[3000])
    page = reported(findings, folder)
    assert f"findings/run.py {folder} --minutes 150 --seeds 2 --prompts 100\n" in page
    assert f"findings/run.py {folder} --only demo --seeds 1\n" in page
