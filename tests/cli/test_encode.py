"""`stdit data encode`, `inspect`, `merge`, `sizes` as a user types them, up to training on what they make."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset
from stdit_data.video.write import write_mp4

SMALL = ["--set", "data.clips=6", "--frames", "4", "--height", "16", "--width", "16"]
TRAIN = ["--steps", "2", "--batch", "2", "--set", "sampling.steps=2", "--set", "model.depth=1"]
SIZE = ["--set", "data.frames=4", "--set", "data.height=16", "--set", "data.width=16"]


def test_encode_inspect_train(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("data", "encode", "shapes", "cache", *SMALL)
    assert done.code == 0, done.err
    assert "stdit train --stage demo --data cache" in done.out
    again = stdit("data", "encode", "shapes", "cache", *SMALL)
    assert (again.code, "clips: 6 of 6 are already done" in again.out) == (0, True)

    shown = stdit("data", "inspect", "cache", "--samples", "2", "--out", "look.png")
    assert shown.code == 0, shown.err
    for word in ("demo (hash ", "scaling_factor", "text encoder", "6, of 6 clips", "clips of 4x16x16", "1 of 1 shards"):
        assert word in shown.out, word
    picture = np.asarray(Image.open(tmp_path / "look.png").convert("HSV"))
    assert (picture[..., 1] > 100).mean() > 0.01  # coloured shapes are to be seen

    run = stdit("train", "--data", "cache", *SIZE, *TRAIN)
    assert run.code == 0, run.err
    config = json.loads((tmp_path / "runs" / "demo" / "config.json").read_text())
    assert config["data"]["vae"] == "demo"
    wrong = stdit("train", "--data", "cache", *TRAIN)
    assert wrong.code == 2
    assert "holds clips of 4x16x16, stage demo trains on 16x64x64" in wrong.err


def test_parts_made_apart_are_merged(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("data", "encode", "shapes", "a", *SMALL, "--video-only").code == 0
    assert stdit("data", "encode", "shapes", "b", *SMALL, "--text-only", "--text-batch", "4").code == 0
    assert not (tmp_path / "a" / "text").exists()
    assert not (tmp_path / "b" / "video").exists()
    assert "missing" in stdit("data", "inspect", "a", "--samples", "0").out
    done = stdit("data", "merge", "a", "b")
    assert (done.code, "text: complete" in done.out) == (0, True)
    assert LatentDataset("a").load(0, seed=0, epoch=0).text is not None
    other = stdit("data", "encode", "shapes", "c", *SMALL, "--text-only", "--seed", "9")
    assert other.code == 0
    refused = stdit("data", "merge", "a", "c")
    assert refused.code == 2
    assert "another manifest than requested" in refused.err


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


def test_a_slurm_array_shares_the_shards(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in (6, 4):
        for name, value in (("COUNT", 2), ("MIN", 4), ("STEP", 2), ("ID", task)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        done = stdit("data", "encode", "shapes", "cache", *SMALL, "--video-only", "--shard-mb", "0.0003")
        assert done.code == 0, done.err
        assert ("rank 1 of 2" in done.out or "rank 1 is done" in done.out) == (task == 6)
    assert len(LatentDataset("cache")) == 6


@pytest.mark.parametrize(
    ("gpus", "world", "options", "place"),
    [
        (0, 1, [], ("Inline", 1)),
        (4, 1, [], ("Processes", 4)),
        (4, 2, [], ("Inline", 1)),  # each of torchrun's processes has a GPU
        (0, 1, ["--processes", "3"], ("Processes", 3)),
        (0, 1, ["--ray", "auto", "--processes", "5", "--gpus", "0.5"], ("RayCluster", 5)),
    ],
)
def test_where_clips_are_encoded(
    gpus: int, world: int, options: list[str], place: tuple[str, int], stdit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    seen = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("stdit_cli.commands.latents.run_encode", lambda *arguments: seen.append(arguments[-1]))
    if world > 1:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", str(world))
    assert stdit("data", "encode", "shapes", "out", *options).code == 0
    (found,) = seen
    assert (type(found.executor).__name__, found.executor.width) == place
    assert (found.share.world, found.gpus) == (world, 0.5 if "--gpus" in options else 0.0)


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


def test_clips_that_cannot_be_read_are_told(stdit: Callable, tmp_path: Path) -> None:
    """Few clips are judged at the end: none of them stops the work, since the next one may be good."""
    rows = ["path,caption"]
    for number in range(4):
        write_mp4(tmp_path / f"{number}.mp4", torch.zeros(3, 20, 32, 32), fps=8)
        rows.append(f"{number}.mp4,a clip")
    (tmp_path / "3.mp4").write_bytes((tmp_path / "3.mp4").read_bytes()[:600])
    (tmp_path / "set.csv").write_text("\n".join(rows))
    command = ["data", "encode", "set.csv", "out", "--vae", "demo", "--video-only", "--processes", "1", "--frames", "4"]
    command += ["--height", "32", "--width", "32"]
    done = stdit(*command)
    assert done.code == 2, done
    assert "1 of 4 entries could not be read, the first: " in done.err and "3.mp4: " in done.err
    assert "stdit data validate --write" in done.err and "done" not in done.out
    done = stdit(*command, "--set", "data.max_reject_share=0.5")
    assert done.code == 0, done
    assert "1 of 4 entries could not be read, the first: " in done.out and "done: " in done.out


def without(find_spec: Callable, name: str) -> Callable:
    return lambda wanted, *rest: None if wanted == name else find_spec(wanted, *rest)


def test_a_folder_of_other_files_is_no_place_for_a_cache(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    done = stdit("data", "encode", "shapes", "clips")
    assert (done.code, done.err) == (
        2, "stdit: clips holds other files, such as a.mp4: name a new folder for the cache\n"
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]


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


STDIT = [sys.executable, "-c", "from stdit_cli.main import main; main()"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run in an empty folder, on one thread each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each shard was written, and as which file."""
    found = {path: path.stat() for path in folder.rglob("*.safetensors")}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def write_clips(folder: Path, count: int) -> str:
    folder.mkdir()
    for index in range(count):
        clip = ShapesDataset(frames=20, height=64, width=64, length=count).load(index)
        write_mp4(folder / f"{index:02d}.mp4", clip.video, 8.0)
        (folder / f"{index:02d}.txt").write_text(clip.caption)
    return str(folder)


def test_footage_that_the_demos_parts_do_not_know_is_said(stdit: Callable, tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 2)
    asked = ["data", "encode", clips, "cache", "--frames", "4", "--height", "16", "--width", "16"]
    done = stdit(*asked, "--video-only")
    assert done.code == 0, done
    assert (done.out.count("the demo's VAE knows flat shapes alone"), done.out.count("--text-encoder")) == (1, 0)
    done = stdit(*asked, "--text-only")
    assert (done.out.count("flat shapes"), done.out.count("the demo's text encoder knows the words of")) == (0, 1), done
    done = stdit("train", "--data", "cache", *SIZE, *TRAIN)
    assert done.code == 0, done
    assert done.out.count("encode with --vae stabilityai/sd-vae-ft-ema --text-encoder ") == 1
    assert stdit("data", "encode", "shapes", "own", *SMALL).out.count("warning") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["shapes", "videos"])
def test_killed_on_the_command_line(source: str, tmp_path: Path) -> None:
    """SIGKILL at four moments; the same command resumes, what is done stays as it is, and nothing is torn."""
    clips = "shapes" if source == "shapes" else write_clips(tmp_path / "clips", 20)
    settings = ["data.clips=120"] if source == "shapes" else ["data.interval=1"]
    command = [*STDIT, "data", "encode", clips, "cache", "--variants", "1" if source == "shapes" else "6"]
    command += ["--shard-mb", "0.0625", "--set", *settings]
    out = tmp_path / "cache"
    before: dict[Path, tuple[int, int]] = {}
    for more, delay in ((1, 0.0), (2, 0.011), (5, 0.023), (3, 0.005)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(stamps(out)) < len(before) + more:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.wait()
        after = stamps(out)
        assert before.items() <= after.items()
        for path in after:
            with safe_open(path, "pt") as shard:
                assert all(shard.get_tensor(name).isfinite().all() for name in shard.keys())  # noqa: SIM118
        before = after
    assert 11 <= len(before) < 30
    subprocess.run(command, check=True)
    assert before.items() <= stamps(out).items()
    assert len(LatentDataset(str(out))) == (120 if source == "shapes" else 20)
    command[command.index("cache")] = "whole"
    subprocess.run(command, check=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    """Each makes its share, both at once, and together what one makes."""
    rest = ["--set", "data.clips=40", "--shard-mb", "0.0625"]
    alone = [*STDIT, "data", "encode", "shapes", "alone", *rest]
    subprocess.run(alone, check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    shared = [*torchrun, *STDIT, "data", "encode", "shapes", "shared", *rest]
    done = subprocess.run(shared, check=True, capture_output=True, text=True)
    assert "done: shared." in done.stdout
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_three_processes_killed_and_started_again(tmp_path: Path) -> None:
    """Models, data set and settings reach the processes; the cache is that of one, and no shard is made twice."""
    clips = write_clips(tmp_path / "clips", 20)
    command = [*STDIT, "data", "encode", clips, "cache", "--variants", "6", "--shard-mb", "0.0625"]
    command += ["--set", "data.interval=1"]
    several = subprocess.Popen([*command, "--processes", "3"], stdout=subprocess.DEVNULL, start_new_session=True)
    while len(stamps(tmp_path / "cache")) < 3:
        assert several.poll() is None
        time.sleep(0.05)
    os.killpg(several.pid, signal.SIGKILL)
    several.wait()
    before = stamps(tmp_path / "cache")
    subprocess.run([*command, "--processes", "2"], check=True)
    assert before.items() <= stamps(tmp_path / "cache").items()
    command[command.index("cache")] = "alone"
    subprocess.run(command, check=True)
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_on_ray(tmp_path: Path) -> None:
    """The models reach the workers of a cluster, and the cache is that of one process."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    command = [*STDIT, "data", "encode", "shapes", "cache", "--set", "data.clips=40", "--shard-mb", "0.0625"]
    subprocess.run([*command, "--ray", "local", "--processes", "2"], check=True)
    command[command.index("cache")] = "alone"
    subprocess.run(command, check=True)
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_threads_and_processes_mean_the_same_in_every_command(stdit: Callable, tmp_path: Path) -> None:
    import typer

    from stdit_cli.commands.data import app

    helps: dict[str, set[str]] = {}
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            if not getattr(option, "hidden", False):
                helps.setdefault(option.opts[0], set()).add(getattr(option, "help", None) or "")
    assert "--workers" not in helps
    assert all("rocesses" in text and "workers of the Ray cluster" in text for text in helps["--processes"])
    assert all(text.startswith("Threads that read") for text in helps["--threads"])
    write_clips(tmp_path / "clips", 1)
    encode = ["data", "encode", "clips", "cache", "--video-only", *SMALL]
    for command in (["data", "validate", "clips"], encode):
        done = stdit(*command, "--workers", "1")
        assert (done.code, done.err) == (0, "stdit: --workers is deprecated: use --threads\n"), done
        done = stdit(*command, "--threads", "1")
        assert (done.code, done.err) == (0, ""), done
