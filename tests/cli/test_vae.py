"""VAEs on the command line: trained, measured, used; what a user can get wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.video.write import write_mp4
from stdit_train.config.schema import VaeConfig
from stdit_train.vae.networks import build_vae

TINY = [
    "--steps", "2", "--batch", "2", "--set", "data.frames=3", "--set", "data.height=16", "--set", "data.width=16",
    "--set", "data.clips=4", "--set", "vae.channels=[8,8]", "--set", "vae.groups=4", "--set", "vae.temporal=2",
]  # fmt: skip


@pytest.fixture
def run(stdit: Callable, tmp_path: Path) -> Path:
    """The run of a video VAE, three frames of 16 pixels."""
    image = build_vae(VaeConfig(channels=(8, 8), layers=1, groups=4, attention=False))
    image.save_pretrained(tmp_path / "image")
    done = stdit("train", "--stage", "vae-demo-video", *TINY, "--init", "image", "--out", "run")
    assert done.code == 0, done
    assert "stage vae-demo-video: video VAE, 3x16x16" in done.out
    assert "an image VAE; what looks back in time starts at zero" in done.out
    assert "measure it: stdit eval run; train an STDiT on it: --vae run" in done.out
    return tmp_path / "run"


def test_a_vae_is_trained_measured_and_kept_apart_from_pipelines(stdit: Callable, run: Path, tmp_path: Path) -> None:
    done = stdit("eval", "run", "--vae-clips", "3", "--out", "scores.json", "--sheet", "sheet.png")
    assert done.code == 0, done
    for word in ("mean of 3 clips of 3x16x16", "PSNR (dB)", "flicker of reconstructions", "frame"):
        assert word in done.out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["measures"].keys() == {"PSNR (dB)", "SSIM", "flicker of originals", "flicker of reconstructions"}
    assert len(written["positions"]) == 3
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "clips").mkdir()
    for i in range(2):
        write_mp4(tmp_path / "clips" / f"{i}.mp4", ShapesDataset(frames=20).load(i).video, 8.0)
    done = stdit("eval", "run/vae", "--data", "clips", "--frames", "5", "--size", "24x32", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["settings"]["size"] == [5, 24, 32]

    for arguments, message in (
        (
            ("eval", "run", "--size", "17x16"),
            "height 17 is not a multiple of 2: take 16 or 18",
        ),
        (("eval", "run", "--size", "24"), "--size 24: expected HEIGHTxWIDTH"),
        (("eval", "run", "--steps", "3"), "--steps is for pipelines, and run is a VAE: leave it out"),
        (("eval", "--size", "16x16"), "--size and --sheet are for a VAE, and demo is none"),
        (("sample", "a red circle", "--checkpoint", "run"), "run is a VAE, not a pipeline"),
        (("export", "run", "out"), "run trains a VAE, not a pipeline"),
    ):
        refused = stdit(*arguments)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused
        assert message in refused.err

    assert stdit("report", "run", "--out", "report").code == 0
    assert "last validation PSNR" in (tmp_path / "report" / "report.html").read_text()


def test_what_a_vae_cannot_take_is_told_before_anything_is_trained(stdit: Callable, tmp_path: Path) -> None:
    for values, message in (
        (["--set", "data.frames=16"], "16 frames: a video VAE of vae.temporal 4 takes 1 + a multiple of it"),
        (["--init", "none"], "no VAE at none: give a folder or a Hub id with --init"),
        (["--nproc", "3"], "nearest is --set global_batch=3"),
    ):
        done = stdit("train", "--stage", "vae-demo-video", *values)
        assert (done.code, done.err.count("\n")) == (2, 1), done
        assert message in done.err
    assert not (tmp_path / "runs").exists()


def test_plans_count_the_vae(stdit: Callable) -> None:
    done = stdit("plan", "--stage", "vae-video-256", "--gpus", "2", "--gpu", "80GB,900TFLOPS")
    assert done.code == 0, done
    assert "a copy on each, the default" in done.out
    assert "parameters   268,429,864\n" in done.out  # 8,293,185 of them the discriminator
    assert "matrix products of the VAE" in done.out
    assert "image VAE" in stdit("stages").out
