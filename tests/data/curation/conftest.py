"""A folder of raw videos with known scenes and known faults."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

RATE = 24
SIZE = (160, 96)  # width, height


def texture(seed: int, width: int = SIZE[0], height: int = SIZE[1]) -> np.ndarray:
    """[H, W, 3] uint8 with structure at several scales and a colour of its own."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cell, weight in ((32, 0.6), (8, 0.25), (3, 0.15)):
        grid = rng.uniform(0, 255, (height // cell + 2, width // cell + 2, 3))
        pixels += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return (pixels * 0.7 + rng.uniform(0, 70, 3)).clip(0, 255).astype(np.uint8)


def moving(seed: int, seconds: float, speed: int = 1) -> list[np.ndarray]:
    """A texture that moves right by `speed` pixels a frame."""
    picture = texture(seed)
    return [np.roll(picture, number * speed, axis=1) for number in range(round(seconds * RATE))]


def letterboxed(pictures: list[np.ndarray], bar: int = 16) -> list[np.ndarray]:
    """Black bars above and below."""
    framed = []
    for picture in pictures:
        picture = picture.copy()
        picture[:bar] = picture[-bar:] = 0
        framed.append(picture)
    return framed


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, encode_clip: Callable[..., Path]) -> Path:
    """scenes.mp4 (3 s, cut, 12 s, black, 4 s), clips with one fault each, copies, a picture and a broken file."""
    folder = tmp_path_factory.mktemp("raw")

    def write(name: str, pictures: list[np.ndarray], **options: object) -> None:
        encode_clip(folder / name, pictures=pictures, size=SIZE, rate=RATE, gop=RATE, **options)

    black = [np.zeros((SIZE[1], SIZE[0], 3), np.uint8)] * (RATE // 2)
    write("scenes.mp4", [*moving(1, 3), *moving(2, 12), *black, *moving(3, 4)])
    good = moving(4, 3)
    write("good.mp4", good)
    shutil.copy(folder / "good.mp4", folder / "copy.mp4")
    write("reencoded.mp4", good, options={"crf": "40"})
    write("still.mp4", moving(5, 3, speed=0))
    write("blurred.mp4", [cv2.GaussianBlur(picture, (0, 0), 6) for picture in moving(6, 3)])
    write("letterboxed.mp4", letterboxed(moving(7, 3)))
    Image.fromarray(texture(8)).save(folder / "photo.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder
