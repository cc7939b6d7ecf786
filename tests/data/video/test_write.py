"""GIF, WebP, PNG frames and pictures written, and whole files read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.video.read import read_picture, read_video
from stdit_data.video.write import export_video, write_frames, write_gif, write_mp4, write_png, write_webp


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return ShapesDataset(frames=10, height=32, width=48).load(0).video


def pixels(video: torch.Tensor) -> np.ndarray:
    """[T, H, W, 3] uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()


def frames_of(path: Path) -> tuple[np.ndarray, int]:
    """Frames [T, H, W, 3], and milliseconds in all."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        shown = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return np.stack([frame for frame, _ in shown]), sum(duration for _, duration in shown)


def test_webp_is_lossless(video: torch.Tensor, tmp_path: Path) -> None:
    write_webp(tmp_path / "x.webp", video, 8)
    shown, milliseconds = frames_of(tmp_path / "x.webp")
    assert np.array_equal(shown, pixels(video))
    assert milliseconds == 1250


@pytest.mark.parametrize("fps", [8, 24, 30])
def test_a_gif_is_close_and_as_long_as_the_video(video: torch.Tensor, tmp_path: Path, fps: float) -> None:
    write_gif(tmp_path / "x.gif", video, fps)
    shown, milliseconds = frames_of(tmp_path / "x.gif")
    assert np.abs(shown.astype(int) - pixels(video).astype(int)).mean() < 2
    assert abs(milliseconds - 10_000 / fps) <= 5


def test_frames_are_lossless_and_replace_older_ones(video: torch.Tensor, tmp_path: Path) -> None:
    write_frames(tmp_path / "x", video)
    write_frames(tmp_path / "x", video[:, :3])
    files = sorted((tmp_path / "x").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    assert np.array_equal(np.asarray(Image.open(files[2])), pixels(video)[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_a_picture_comes_back(video: torch.Tensor, tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", video[:, :1])
    picture = read_picture(str(tmp_path / "x.png"), 32, 48)
    assert (picture - video[:, 0]).abs().max() <= 1 / 127.5
    assert read_picture(str(tmp_path / "x.png"), 16, 16).shape == (3, 16, 16)
    with pytest.raises(DataError, match="one frame, not 10"):
        write_png(tmp_path / "y.png", video)


def test_a_video_comes_back_whole(video: torch.Tensor, tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", video, 8, crf=0)
    again, fps = read_video(str(tmp_path / "x.mp4"), 32, 48)
    assert (again.shape, fps) == (video.shape, 8.0)
    assert (again - video).abs().mean() < 0.02
    faster, fps = read_video(str(tmp_path / "x.mp4"), 32, 48, fps=16)
    assert (faster.shape[1], fps) == (19, 16.0)
    torch.testing.assert_close(faster[:, ::2], again)
    slower, _ = read_video(str(tmp_path / "x.mp4"), 32, 48, fps=4)
    torch.testing.assert_close(slower, again[:, ::2])


def test_what_cannot_be_read_is_named(video: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError, match=r"bad\.mp4"):
        read_video(str(tmp_path / "bad.mp4"), 32, 48)
    with pytest.raises(ClipError, match=r"none\.png"):
        read_picture(str(tmp_path / "none.png"), 32, 48)
    with pytest.raises(ClipError, match="not an image"):
        read_picture(str(tmp_path / "bad.mp4"), 32, 48)
    for write in (write_gif, write_webp):
        with pytest.raises(DataError, match="fps"):
            write(tmp_path / "x", video, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.mp4"]


@pytest.mark.parametrize("kind", ["pt", "np", "uint8", "pil"])
def test_a_video_is_exported_from_whatever_a_pipeline_returns(video: torch.Tensor, tmp_path: Path, kind: str) -> None:
    array = pixels(video)
    given = {
        "pt": video,
        "np": (video / 2 + 0.5).permute(1, 2, 3, 0).numpy(),
        "uint8": array,
        "pil": [Image.fromarray(frame) for frame in array],
    }[kind]
    path = export_video(given, tmp_path / "new" / "x.webp", fps=10)
    shown, milliseconds = frames_of(path)
    assert np.array_equal(shown, array)
    assert milliseconds == 1000


def test_a_video_is_exported_in_the_format_of_its_name(video: torch.Tensor, tmp_path: Path) -> None:
    export_video(video, tmp_path / "x.MP4", 8)
    write_mp4(tmp_path / "y.mp4", video, 8)
    assert (tmp_path / "x.MP4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    export_video(video, str(tmp_path / "x.gif"), 8)
    assert frames_of(tmp_path / "x.gif")[1] == 1250
    export_video(video[:, :1], tmp_path / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels(video)[0])
    export_video(video, tmp_path / "frames")
    assert len(list((tmp_path / "frames").iterdir())) == 10


@pytest.mark.parametrize(
    ("frames", "name", "said"),
    [
        (torch.zeros(2, 3, 4, 8, 8), "x.mp4", "2 videos: write one at a time"),
        (np.zeros((1, 4, 8, 8, 3)), "x.mp4", "1 videos"),
        ([[Image.new("RGB", (8, 8))]], "x.mp4", r"frames\[0\]"),
        ([], "x.mp4", "no frames"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "x.mp4", "several sizes"),
        (np.zeros((4, 8, 8)), "x.mp4", r"expected \[T, H, W, 3\]"),
        (torch.zeros(4, 8, 8), "x.mp4", r"expected \[3, T, H, W\]"),
        (torch.zeros(3, 4, 8, 8), "x.avi", r"\.mp4, \.gif, \.webp, \.png"),
        (torch.zeros(3, 4, 8, 8), "x.png", "one frame"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, frames: Any, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        export_video(frames, tmp_path / name)
    assert not (tmp_path / name).exists()
