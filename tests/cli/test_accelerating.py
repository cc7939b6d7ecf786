"""`stdit sample --cache`, `--offload` and `--compile`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stdit_model import STDiT, STDiTPipeline
from stdit_train.pipeline.load import offload_pipeline

RED = "a red circle moving left"
ONE = ["--frames", "1", "--steps", "6"]


def test_a_cache_is_used_and_recorded(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", RED, *ONE, "--cache", "taylorseer:2", "--out", "a.png").code == 0
    assert json.loads((tmp_path / "a.png.json").read_text())["settings"]["cache"] == "taylorseer:2"
    assert stdit("sample", "--from", "a.png", "--out", "b.png").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert stdit("sample", RED, *ONE, "--out", "c.png").code == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_blocks_are_compiled(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(STDiT, "compile_repeated_blocks", lambda self: compiled.append(self))
    monkeypatch.setenv("CXX", "true")  # any program
    assert stdit("sample", RED, *ONE, "--compile", "--out", "a.png").code == 0
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cache", "teacache"], "cache teacache: choose first-block, pab, fastercache, taylorseer"),
        (["--offload", "disk"], "--offload disk: choose model, group, sequential"),
        (["--offload", "model", "--low-memory"], "--offload and --low-memory: choose one of the two"),
        (["--offload", "model", "--text-8bit"], "--offload and --text-8bit: choose one of the two"),
        (["--offload", "group"], "--offload group: this machine computes on the CPU"),
        (["--compile"], "--compile needs a C++ compiler"),
    ],
    ids=str,
)
def test_refused(stdit: Callable, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.setattr("stdit_train.pipeline.load.find_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = stdit("sample", RED, *ONE, *arguments)
    assert done.code == 2, done
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize("way", ["model", "group"])
def test_an_offloaded_pipeline_makes_the_same_video(way: str) -> None:
    """On the CPU nothing moves, but every hook runs."""

    def video(pipeline: STDiTPipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(RED, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).frames

    plain = video(STDiTPipeline.from_pretrained("demo"))
    assert torch.equal(video(offload_pipeline(STDiTPipeline.from_pretrained("demo"), way, torch.device("cpu"))), plain)


def test_sequential_offload_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it makes the same video is a test of stdit-model: diffusers asks for a GPU here."""
    asked = []
    monkeypatch.setattr(STDiTPipeline, "enable_sequential_cpu_offload", lambda self, device: asked.append(device))
    offload_pipeline(STDiTPipeline.from_pretrained("demo"), "sequential", torch.device("cuda"))
    assert asked == [torch.device("cuda")]
