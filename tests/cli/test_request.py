"""All of a request to `stdit sample` is checked before anything is loaded, and what is written afterwards is whole."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.outputs import sidecar_path, slug
from stdit_cli.commands.sample.request import PromptRequest, SampleRequest, Settings
from stdit_data.video.probe import probe
from stdit_data.video.write import write_mp4
from stdit_model import STDiT
from stdit_train.assets import demo_folder

RED = "a red circle staying still"
ONE = ["--frames", "1", "--steps", "1"]


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("stdit_cli.commands.sample.generate.load_pipeline", load)


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Pictures, videos and weights, good and bad."""
    write_mp4(tmp_path / "clip.mp4", torch.zeros(3, 4, 16, 16), 8)
    Image.new("RGB", (16, 16)).save(tmp_path / "still.png")
    for name in ("junk.png", "junk.mp4", "junk.pth", "notes.txt"):
        (tmp_path / name).write_bytes(b"junk" * 100)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"model": object}, tmp_path / "code.pth")
    shutil.copytree(demo_folder() / "vae", tmp_path / "vae")
    model = STDiT(depth=1, hidden_size=72, num_heads=1, caption_channels=8, model_max_length=12)
    torch.save(model.state_dict(), tmp_path / "stdit.pth")
    (tmp_path / "taken.mp4.json").mkdir()


@pytest.mark.usefixtures("nothing_loaded", "files")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "avi"], ["--format avi", "mp4, gif, webp, png, frames"]),
        (["--format", "png"], ["a png holds one frame, not 16"]),
        (["--format", "png", "--frames", "4"], ["a png holds one frame, not 4"]),
        (["--format", "png", "--video", "clip.mp4"], ["a png holds one frame"]),
        (["--out", "x.png"], ["a png holds one frame"]),
        (["--out", "junk.mp4/x.mp4"], ["junk.mp4 is a file"]),
        (["--out", "junk.mp4/deep/er"], ["junk.mp4 is a file"]),
        (["--out", "taken.mp4"], ["taken.mp4.json is a folder"]),
        (["--out", "taken.mp4", "--overwrite"], ["taken.mp4.json is a folder"]),
        (["--out", f"{'x' * 300}.mp4"], ["File name too long"]),
        (["--sampler", "eulr"], ["sampler eulr", "euler, ddpm, ddim, dpmsolver++, unipc"]),
        (["--sampler", "ddim"], ["sampler ddim", "rectified flow", "euler"]),
        (["--compat", "open-sora-1.0"], ["ddpm", "rectified flow"]),
        (["--sampler", "euler", "--checkpoint", "stdit.pth"], ["sampler euler", "epsilon or v prediction", "unipc"]),
        (["--steps", "1001"], ["--steps 1001", "1 to 1000"]),
        (["--size", "0x64"], ["--size 0x64", "1 to 8192"]),
        (["--size", "64x9000"], ["--size 64x9000", "1 to 8192"]),
        (["--size", "9" * 5000], ["HEIGHTxWIDTH"]),
        (["--frames", "1000000"], ["--frames 1000000", "1 to 100000"]),
        (["--num", "1000000000"], ["--num 1000000000"]),
        (["--seed", str(2**63 - 1), "--num", "2"], ["--seed and --num", str(2**63)]),
        (["--overlap", "16", "--frames", "32"], ["--overlap 16", "1 to 15"]),
        (["--overlap", "16", "--video", "clip.mp4"], ["--overlap 16", "1 to 15"]),
        (["--image", "junk.png"], ["junk.png"]),
        (["--image", "clip.mp4"], ["--image clip.mp4", "expected a picture"]),
        (["--video", "junk.mp4"], ["junk.mp4"]),
        (["--video", "still.png"], ["--video still.png", "--image"]),
        (["--checkpoint", "junk.pth"], ["junk.pth: neither a safetensors file nor a torch archive"]),
        (["--checkpoint", "notes.txt"], ["notes.txt: neither a safetensors file nor a torch archive"]),
        (["--checkpoint", "clip.mp4"], ["clip.mp4: neither"]),
        (["--checkpoint", "other.pth"], ["other.pth"]),
        (["--checkpoint", "code.pth"], ["code.pth", "not a torch archive of tensors alone"]),
        (["--checkpoint", "vae"], ["vae is a VAE, not a pipeline", "--vae vae"]),
        (["a \udcff circle"], ["is not UTF-8"]),
        (["--negative", "\udcff"], ["is not UTF-8"]),
        (["###"], ["the prompt '###' has no words left", "describe the video in English"]),
        (["--negative", "@x"], ["the negative prompt '@x' has no words left"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else value,
)
def test_before_anything_is_loaded(
    stdit: Callable, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setattr("stdit_model.weights.hub._ask", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    done = stdit("sample", RED, *arguments)
    assert done.code == 2, done
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert "Errno" not in done.err
    for text in said:
        assert text in done.err
    assert not Path("videos").exists()


@pytest.mark.usefixtures("nothing_loaded")
def test_a_folder_that_cannot_be_written_to(stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    done = stdit("sample", RED, "--out", tmp_path / "locked" / "new" / "x.mp4")
    assert done.code == 2, done
    assert f"{tmp_path / 'locked'} cannot be written to" in done.err


@pytest.mark.parametrize("value", [0, -1, 10**6, float("nan")])
def test_numbers_of_an_edited_sidecar_have_bounds(value: Any) -> None:
    with pytest.raises(ValueError, match=r"--steps .*: expected 1 to 1000"):
        Settings(steps=value).check()
    with pytest.raises(ValueError, match=r"--fps .*: expected 0\.1 to 1000"):
        Settings(fps=value).check()


def test_a_hub_id_without_the_hub_is_one_line_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed again: connections are refused
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from stdit_cli.main import main; main()"]
    done = subprocess.run(
        [*command, "sample", "x", "--checkpoint", "nobody/nothing"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **offline},
    )  # fmt: skip
    assert done.returncode == 2, done
    (line,) = done.stderr.strip().splitlines()
    assert f"http://127.0.0.1:{port} cannot be reached (Connection refused)" in line
    assert "hf download nobody/nothing" in line
    assert "Errno" not in line


def test_offline_by_choice_is_one_line_at_once(stdit: Callable) -> None:
    started = time.monotonic()
    done = stdit("sample", "x", "--checkpoint", "nobody/nothing")
    assert time.monotonic() - started < 10
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert "HF_HUB_OFFLINE is set" in done.err


def test_an_empty_negative_prompt_is_none(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", RED, *ONE, "--negative", "", "--out", "a.png").code == 0
    assert stdit("sample", RED, *ONE, "--out", "b.png").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert json.loads((tmp_path / "a.png.json").read_text())["negative"] is None
    assert stdit("sample", RED, *ONE, "--negative", "a bar", "--out", "c.png").code == 0
    assert stdit("sample", "--from", "c.png", "--negative", " ", "--out", "d.png").code == 0
    assert json.loads((tmp_path / "d.png.json").read_text())["negative"] is None


def test_sidecars_of_one_name_do_not_collide(stdit: Callable, tmp_path: Path) -> None:
    short = ["--frames", "2", "--steps", "1"]
    assert stdit("sample", RED, *short, "--out", "v.mp4").code == 0
    done = stdit("sample", RED, *short, "--seed", "1", "--out", "v.gif")
    assert done.code == 0, done
    assert [sidecar.read(tmp_path / name)["seed"] for name in ("v.mp4", "v.gif")] == [0, 1]
    (tmp_path / "v.mp4.json").rename(tmp_path / "v.json")  # as older versions named it
    assert sidecar.read(tmp_path / "v.mp4")["seed"] == 0
    assert sidecar.read(tmp_path / "v.gif")["seed"] == 1
    assert sidecar_path(tmp_path / "frames") == tmp_path / "frames.json"


def test_a_size_that_the_codec_pads_is_said(stdit: Callable, tmp_path: Path) -> None:
    short = ["--frames", "2", "--steps", "1", "--size", "31x50"]
    done = stdit("sample", RED, *short, "--out", "x.mp4")
    assert "mp4 needs even sizes: 31x50 is written as 32x50" in done.out, done
    assert (probe("x.mp4").height, probe("x.mp4").width) == (32, 50)
    assert "even" not in stdit("sample", RED, *short, "--out", "x.webp").out
    assert Image.open(tmp_path / "x.webp").size == (50, 31)


def test_names_of_files_have_room_for_long_letters() -> None:
    assert len(slug("\U00020000" * 100).encode()) <= 180
    assert slug("A red circle, moving left") == "a-red-circle-moving-left"


def test_what_cannot_be_written_leaves_nothing_half(
    stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stdit_data.storage.atomic._flush_to_disk", full)
    done = stdit("sample", RED, *ONE, "--out", "out/x.png")
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "Errno" not in done.err
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_a_request_to_end_leaves_nothing_half_either(stdit: Callable, tmp_path: Path) -> None:
    import signal

    from stdit_cli.console import ended_by_signal

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_request_to_end_data_work_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    from stdit_cli.workers import interruptible

    with pytest.raises(typer.Exit) as ended, interruptible("out.parts"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.exit_code == 130
    assert "finished shards are kept in out.parts; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("errno", "words"),
    [
        (13, "Permission denied"),
        (30, "Read-only file system"),
        (28, "No space left on device"),
        (20, "Not a directory"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    stdit: Callable, monkeypatch: pytest.MonkeyPatch, errno: int, words: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno, words, "some/file")

    monkeypatch.setattr("stdit_cli.commands.sample.command.make_request", refused)
    done = stdit("sample", RED)
    assert done.code == 2
    assert done.err.strip() == f"stdit: cannot read or write some/file: {words}; --debug shows where"


def test_what_only_a_bug_does_shows_its_traceback(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgotten(*_: object) -> None:
        Path("never/made").read_text()

    monkeypatch.setattr("stdit_cli.commands.sample.command.make_request", forgotten)
    with pytest.raises(FileNotFoundError):
        stdit("sample", RED)


def test_a_local_folder_called_demo_takes_precedence(stdit: Callable, tmp_path: Path) -> None:
    shutil.copytree(demo_folder(), tmp_path / "demo")
    index = tmp_path / "demo" / "model_index.json"
    index.write_text(index.read_text().replace('"fps": 8.0', '"fps": 5.0'))
    assert '"fps": 5.0' in index.read_text()
    done = stdit("sample", RED, *ONE, "--checkpoint", "demo", "--out", "a.png")
    assert done.code == 0, done
    assert "bundled" not in done.out
    said = json.loads((tmp_path / "a.png.json").read_text())
    assert (said["settings"]["checkpoint"], said["settings"]["fps"]) == (str(tmp_path / "demo"), 5)
    done = stdit("sample", RED, *ONE, "--out", "b.png")
    assert "using the bundled demo model" in done.out
    assert json.loads((tmp_path / "b.png.json").read_text())["settings"]["fps"] == 8


def test_a_request_of_several_faults_is_told_the_first() -> None:
    request = SampleRequest([PromptRequest("x", seed=2**63 - 1)], Settings(steps=0), num=2)
    with pytest.raises(ValueError, match="--steps 0"):
        request.check()
