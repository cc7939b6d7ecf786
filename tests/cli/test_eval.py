"""`stdit eval`: what it writes, on `shapes` and on a user's clips; what a user can get wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.video.write import write_mp4
from stdit_train.evaluation.evaluate import MEASURES


def test_eval_writes_scores(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("eval", "--prompts", "4", "--steps", "2", "--vae-clips", "3", "--out", "scores.json")
    assert done.code == 0, done
    written = json.loads((tmp_path / "scores.json").read_text())
    assert set(written["scores"]) == {"seen", "held-out"}
    assert len(written["trials"]["held-out"]) == 4
    measures = written["measures"]["seen"]
    outlines = {"shape IoU", "frames with IoU > 0.9", "outline change"}
    of_the_vae = {"VAE PSNR (dB)", "VAE SSIM"} | {f"VAE {name}" for name in outlines}
    assert set(measures) == {"change", "flicker"} | outlines | of_the_vae
    assert measures["VAE shape IoU"]["mean"] > 0.95
    assert 0.5 < measures["shape IoU"]["mean"] < 1
    assert measures["VAE PSNR (dB)"]["mean"] > 25  # the demo's VAE knows its world
    assert measures["VAE SSIM"]["low"] < measures["VAE SSIM"]["mean"] < 1
    assert len(written["prompts"]["seen"]) == 4
    assert written["settings"]["steps"] == 2 and written["settings"]["guidance"] == 1.7  # the model's own
    for word in ("all correct", "held-out (of 4)", "flicker", "VAE PSNR"):
        assert word in done.out
    assert "share right (higher is better)" in done.out
    rows = {cells[1].strip(): cells for line in done.out.splitlines() if len(cells := line.split("│")) > 4}
    assert [cell.strip() for cell in rows["VAE PSNR (dB)"][2:4]] == ["dB", "higher"]
    assert [cell.strip() for cell in rows["outline change"][2:4]] == ["share of the shape's size", "lower"]
    assert set(measures) <= MEASURES.keys()
    assert written["better"]["flicker"] == "lower"


def test_eval_of_single_frames(stdit: Callable) -> None:
    done = stdit("eval", "--prompts", "2", "--split", "seen", "--frames", "1", "--vae-clips", "2", "--json")
    assert done.code == 0, done
    written = json.loads(done.out)
    assert set(written["scores"]["seen"]) == {"all", "colour", "shape"}
    assert written["settings"]["frames"] == 1
    assert {trial["reading"]["frames"] for trial in written["trials"]["seen"]} == {1}


def test_eval_prints_json_alone(stdit: Callable) -> None:
    done = stdit("eval", "--prompts", "1", "--split", "seen", "--steps", "1", "--vae-clips", "0", "--json")
    assert done.code == 0, done
    written = json.loads(done.out)
    assert list(written["scores"]) == ["seen"]
    assert written["settings"]["prompts"] == 1 and "as_json" not in written["settings"]


def test_captions_of_clips_are_prompts(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    clips = ShapesDataset(frames=52)
    for i in range(3):
        write_mp4(tmp_path / "clips" / f"{i}.mp4", clips.load(i).video, 8.0)
        (tmp_path / "clips" / f"{i}.txt").write_text(clips.caption(i))
    done = stdit("eval", "--data", "clips", "--prompts", "2", "--steps", "2", "--out", "scores.json")
    assert done.code == 0, done
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [seed for _, seed in written["prompts"]["data"]] == [0, 1]
    assert written["measures"]["data"]["VAE PSNR (dB)"]["count"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "new"], ["--split new", "held-out"]),
        (["--clip", "./nowhere"], ["--clip ./nowhere", "openai/clip"]),
        (["--fvd", "i3d.pt"], ["--fvd i3d.pt", "no such file"]),
        (["--out", "nowhere/scores.json"], ["no folder nowhere"]),
        (["--data", "empty"], ["empty"]),
    ],
)
def test_what_can_be_mistyped(stdit: Callable, tmp_path: Path, options: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    done = stdit("eval", *options)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
