"""The commands themselves, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.video.write import write_mp4
from stdit_train.assets import demo_folder
from stdit_train.evaluation.shape_reader import analyse

TINY = ["--steps", "4", "--batch", "2", "--set", "data.clips=4", "--set", "data.frames=4", "--set", "sampling.steps=2"]


def read_mp4(path: Path) -> tuple[torch.Tensor, str, str, float]:
    """[3, T, H, W] in [-1, 1], codec, pixel format, fps."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        facts = stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0, *facts


def test_a_red_circle(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("sample", "a red circle moving left")
    assert done.code == 0, done
    assert "bundled demo model" in done.out
    video, codec, pixel_format, fps = read_mp4(tmp_path / "videos" / "a-red-circle-moving-left-0.mp4")
    assert (tuple(video.shape), codec, pixel_format, fps) == ((3, 16, 64, 64), "h264", "yuv420p", 8.0)
    reading = analyse(video)
    assert (reading.colour, reading.shape, reading.motion) == ("red", "circle", "left")


def test_the_same_seed_is_the_same_video(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", "a blue cross moving up", "--seed", "3", "--num", "2", "--out", "a").code == 0
    for folder in "bc":
        assert stdit("sample", "a blue cross moving up", "--seed", "4", "--out", folder).code == 0
    batched, alone, again = (read_mp4(tmp_path / folder / "a-blue-cross-moving-up-4.mp4")[0] for folder in "abc")
    assert torch.equal(alone, again)
    assert (batched - alone).abs().mean() < 0.01  # sums in another order; another seed is 0.04 away
    other = read_mp4(tmp_path / "a" / "a-blue-cross-moving-up-3.mp4")[0]
    assert (other - alone).abs().mean() > 0.02
    assert (tmp_path / "a" / "contact-sheet.png").exists()


def test_nothing_is_overwritten(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    kept = tmp_path / "videos" / "a-white-bar-standing-still-0.mp4"
    kept.write_text("mine")
    assert stdit("sample", "a white bar standing still", "--steps", "1").code == 0
    assert kept.read_text() == "mine"
    assert (tmp_path / "videos" / "a-white-bar-standing-still-0-2.mp4").exists()
    done = stdit("sample", "a white bar standing still", "--out", kept)
    assert done.code == 2
    assert "--overwrite" in done.err


def test_unknown_words_and_sizes_are_said(stdit: Callable) -> None:
    done = stdit("sample", "a red dragon moving left", "--steps", "1", "--size", "32x48", "--frames", "8")
    assert done.code == 0, done
    (warning,) = [line for line in done.out.splitlines() if line.startswith("warning")]
    for said in ("unknown words 'dragon'", "trained on 16x64x64", "8x32x48"):
        assert said in warning
    assert "guidance" not in warning


def test_single_frames_that_were_trained_on_are_no_warning(stdit: Callable) -> None:
    done = stdit("sample", "a red circle moving left", "--steps", "1", "--frames", "1")
    assert done.code == 0 and "warning" not in done.out, done


def test_guidance_far_above_the_checkpoints_own_is_said(stdit: Callable) -> None:
    done = stdit("sample", "a red circle moving left", "--steps", "1", "--guidance", "7")
    (warning,) = [line for line in done.out.splitlines() if line.startswith("warning")]
    assert "guidance 7 (its own is " in warning


def test_train_resume_and_sample(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("train", "--stage", "demo", *TINY)
    assert done.code == 0, done
    run = tmp_path / "runs" / "demo"
    for name in ("config.json", "metrics.jsonl", "loss.png", "tensorboard", "samples", "checkpoints", "pipeline"):
        assert (run / name).exists(), name
    assert "stdit_train.outputs: step 4: samples in" in (run / "run.log").read_text()
    assert json.loads((run / "config.json").read_text())["steps"] == 4
    done = stdit("train", "--resume", "--steps", "6")
    assert done.code == 0, done
    assert "resuming from" in done.out
    assert (run / "checkpoints" / "step-000006").exists()
    done = stdit("sample", "a red circle moving left", "--checkpoint", "runs/demo", "--out", "x.mp4")
    assert done.code == 0, done
    assert read_mp4(tmp_path / "x.mp4")[0].shape == (3, 4, 64, 64)


@pytest.mark.parametrize("variant", ["dit", "parallel", "latte"])
def test_every_variant_trains_and_samples(stdit: Callable, tmp_path: Path, variant: str) -> None:
    assert stdit("train", "--variant", variant, *TINY).code == 0
    done = stdit("sample", "a red circle moving left", "--checkpoint", "runs/demo", "--out", "x.mp4")
    assert done.code == 0, done
    config = json.loads((tmp_path / "runs" / "demo" / "pipeline" / "transformer" / "config.json").read_text())
    assert config["variant"] == variant


def test_iddpm_trains_and_samples(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("train", "--set", "objective.name=iddpm", *TINY).code == 0
    for sampler in ("ddpm", "ddim", "dpmsolver++", "unipc"):
        done = stdit(
            "sample", "a red bar moving up", "--checkpoint", "runs/demo", "--sampler", sampler, "--steps", "4",
            "--out", f"{sampler}.mp4",
        )  # fmt: skip
        assert done.code == 0, done
        assert torch.isfinite(read_mp4(tmp_path / f"{sampler}.mp4")[0]).all()


def test_training_on_real_files(stdit: Callable, tmp_path: Path) -> None:
    clips = ShapesDataset(frames=20, height=48, width=80)
    (tmp_path / "clips").mkdir()
    for i in range(3):
        clip = clips.load(i)
        write_mp4(tmp_path / "clips" / f"{i}.mp4", clip.video, 8)
        (tmp_path / "clips" / f"{i}.txt").write_text(clip.caption)
    done = stdit("train", "--data", "clips", *TINY)
    assert done.code == 0, done
    (warning,) = [line for line in done.out.splitlines() if "the demo's" in line]
    assert warning == (
        "warning: the demo's VAE knows flat shapes alone, and other footage becomes blobs, and its text encoder knows "
        "the words of `shapes` alone: take --vae stabilityai/sd-vae-ft-ema --text-encoder "
        "DeepFloyd/t5-v1_1-xxl, or others"
    )
    captions = [path.read_text() for path in (tmp_path / "clips").glob("*.txt")]
    assert f"try it: stdit sample '{min(captions, key=len)}' --checkpoint runs/demo\n" in done.out
    rows = [json.loads(line) for line in (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from stdit_cli.main import main; main()", "train", "--stage", "demo", *TINY]
    command[command.index("--steps") + 1] = "100000"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--set", "log_every=1"], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE
    )
    metrics = tmp_path / "runs" / "demo" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stdit train --resume runs/demo" in " ".join(output.split())
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    resumed = [*command[:3], "train", "--resume", "runs/demo", "--steps", str(step + 1)]
    done = subprocess.run(resumed, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step + 1


def test_dry_run_allocates_nothing(stdit: Callable, tmp_path: Path) -> None:
    parts = ["--vae", "stabilityai/sd-vae-ft-ema", "--text-encoder", "DeepFloyd/t5-v1_1-xxl"]
    done = stdit("train", "--stage", "64x512", "--dry-run", *parts)
    assert done.code == 0, done
    assert "759,620,768" in done.out
    assert "65,536 tokens" in done.out
    assert not (tmp_path / "runs").exists()


def test_stages_are_listed(stdit: Callable) -> None:
    done = stdit("stages")
    assert done.code == 0
    for stage in ("16x256", "16x256-hq", "16x512", "64x512", "360x512", "demo"):
        assert stage in done.out
    assert "16x256x256" in done.out and "80,000" in done.out  # whole, at 80 columns
    assert "…" not in done.out and "None" not in done.out


def test_the_bundled_model_is_small_and_described() -> None:
    files = [path for path in demo_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    card = (demo_folder() / "README.md").read_text()
    for word in ("Data:", "Command:", "seed", "Hardware:", "held-out"):
        assert word in card
