"""`stdit data encode`, `inspect`, `merge`, `sizes` as a user types them, up to training on what they make."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stdit_data import cache
from stdit_data.latents import LatentDataset

SMALL = ["--set", "data.clips=6", "--frames", "4", "--height", "16", "--width", "16"]
TRAIN = ["--steps", "2", "--batch", "2", "--set", "sampling.steps=2", "--set", "model.depth=1"]
SIZE = ["--set", "data.frames=4", "--set", "data.height=16", "--set", "data.width=16"]


def test_encode_inspect_train(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("data", "encode", "shapes", "cache", *SMALL)
    assert done.code == 0, done.err
    assert "stdit train --stage demo --data cache" in done.out
    again = stdit("data", "encode", "shapes", "cache", *SMALL)
    assert (again.code, "clips: 6 of 6 are there already" in again.out) == (0, True)

    shown = stdit("data", "inspect", "cache", "--samples", "2", "--out", "look.png")
    assert shown.code == 0, shown.err
    for word in ("demo (hash ", "scaling_factor", "text encoder", "6, of 6 clips", "clips of 4x16x16", "1 of 1 shards"):
        assert word in shown.out, word
    picture = np.asarray(Image.open(tmp_path / "look.png").convert("HSV"))
    assert (picture[..., 1] > 100).mean() > 0.01  # coloured shapes are to be seen

    run = stdit("train", "--data", "cache", *SIZE, *TRAIN)
    assert run.code == 0, run.err
    config = json.loads((tmp_path / "runs" / "demo" / "config.json").read_text())
    assert config["data"]["vae"].endswith("assets/demo")
    wrong = stdit("train", "--data", "cache", *TRAIN)
    assert wrong.code == 2
    assert "holds clips of 4x16x16, stage demo trains on 16x64x64" in wrong.err


def test_parts_made_apart_are_merged(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("data", "encode", "shapes", "a", *SMALL, "--video-only").code == 0
    assert stdit("data", "encode", "shapes", "b", *SMALL, "--text-only", "--text-batch", "4").code == 0
    assert not (tmp_path / "a" / "text").exists()
    assert not (tmp_path / "b" / "video").exists()
    assert "not there" in stdit("data", "inspect", "a", "--samples", "0").out
    done = stdit("data", "merge", "a", "b")
    assert (done.code, "text: complete" in done.out) == (0, True)
    assert LatentDataset("a").load(0, seed=0, epoch=0).text is not None
    other = stdit("data", "encode", "shapes", "c", *SMALL, "--text-only", "--seed", "9")
    assert other.code == 0
    refused = stdit("data", "merge", "a", "c")
    assert refused.code == 2
    assert "another manifest than asked for" in refused.err


def test_shards_of_two_machines_are_merged(stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a folder of its own and its share of the shards."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = stdit("data", "encode", "shapes", f"m{rank}", *SMALL, "--video-only", "--shard-mb", "0.0003")
        assert (done.code, "is done with its share" in done.out) == (0, True), done.err
    assert cache.list_shards("m0", "video") == {0, 2, 4}
    assert "video: complete" in stdit("data", "merge", "m0", "m1").out
    assert len(LatentDataset("m0")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.csv", "out"], "nothing.csv: no such manifest"),
        (["shapes", "out", "--video-only", "--text-only"], "give one of the two"),
        (["shapes", "out", "--vae", "./none"], "no VAE at ./none"),
        (["shapes", "out", "--stage", "nine"], "unknown stage 'nine'"),
        (["shapes", "out", "--height", "20"], "height 20 is not a multiple of 8: take 16 or 24"),
        (["shapes", "out", "--set", "data.hight=3"], "did you mean data.height"),
        (["shapes", "out", "--text-only", "--text-loading", "8bit"], "needs bitsandbytes"),
    ],
)
def test_mistakes_are_one_line(
    stdit: Callable, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", without(importlib.util.find_spec, "bitsandbytes"))
    done = stdit("data", "encode", *arguments)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def without(find_spec: Callable, name: str) -> Callable:
    return lambda wanted, *rest: None if wanted == name else find_spec(wanted, *rest)


def test_no_cache_is_said(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["inspect", "empty"], ["merge", "new", "empty"]):
        done = stdit("data", *command)
        assert done.code == 2
        assert "empty: not a cache" in done.err


def test_sizes(stdit: Callable) -> None:
    out = stdit("data", "sizes").out
    (row,) = [line for line in out.splitlines() if "64x512" in line]
    assert "4 MiB" in row
    assert "78.12 GiB" in row
    assert "960 KiB" in out  # 983,040 bytes: 120 tokens of T5-XXL
    assert "2.5 MiB" in stdit("data", "sizes", "--clips", "10").out  # ten clips of 16x256x256


@pytest.mark.slow
def test_killed_on_the_command_line(tmp_path: Path) -> None:
    """SIGKILL while `stdit data encode` runs; the same command goes on, and what is done stays as it is."""
    command = [sys.executable, "-c", "from stdit_cli.main import main; main()", "data", "encode", "shapes", "cache"]
    command += ["--set", "data.clips=400", "--video-only", "--shard-mb", "0.0625"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while len(cache.list_shards(str(tmp_path / "cache"), "video")) < 3:
        assert process.poll() is None
    process.kill()
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "video").glob("*.safetensors")}
    assert len(there) < 100
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in there.items())
    assert len(LatentDataset(str(tmp_path / "cache"))) == 400
