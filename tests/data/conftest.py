"""Clips encoded for the tests, whose frames carry their numbers, and a store that counts what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any, ClassVar

import av
import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

QUIET = {"libx265": ("x265-params", "log-level=none:pools=1:frame-threads=1")}
FAST = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "13", "svtav1-params": "lp=1"},
}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """[H, W, 3] uint8 that tells its number: a moving gradient and a bar code of big blocks."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([(x * 3 + number * 5) % 256, (y * 4 + number * 2) % 256, (x + y + number) % 256], axis=-1)
    for bit in range(8):
        left = bit * width // 8
        base[: height // 3, left : left + width // 8] = 235 if number >> bit & 1 else 20
    return base.astype(np.uint8)


def encode(
    path: str | Path,
    *,
    codec: str = "libx264",
    frames: int = 40,
    size: tuple[int, int] = (64, 48),
    rate: Fraction | float = 30,
    gop: int = 12,
    b_frames: int = 2,
    start: int = 0,
    durations: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container: str | None = None,
    pixel_format: str = "yuv420p",
    rotation: tuple[int, bool] | None = None,
    prepare: Callable[[Any], None] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    color: tuple[int, int] | None = None,
) -> Path:
    """Encodes numbered frames.

    Args:
        start: time of the first frame, in frames.
        durations: how many frame times each frame stays on screen (a variable rate); one each without it.
        rotation: degrees and whether to mirror, for the display matrix.
        prepare: gets the stream before the first frame.
        pictures: frames to encode instead of numbered ones.
        color: matrix and range of the YUV made, as PyAV numbers them.
    """
    rate = Fraction(rate).limit_denominator(100000)
    options = {**FAST.get(codec, {}), **(options or {})}
    if codec in QUIET:
        key, value = QUIET[codec]
        options[key] = ":".join(filter(None, [value, options.get(key)]))
    with av.open(str(path), "w", format=container, options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        if prepare is not None:
            prepare(stream)
        at = start
        source = pictures if pictures is not None else (picture(number, *size) for number in range(frames))
        for number, pixels in enumerate(source):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            matrix, range_ = color or (None, None)
            # one thread: with several, swscale now and then leaves a slice of 10-bit output unwritten
            frame = frame.reformat(format=pixel_format, dst_colorspace=matrix, dst_color_range=range_, threads=1)
            frame.pts, frame.time_base = at, 1 / rate
            at += durations[number] if durations is not None else 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return Path(path)


def decode_all(path: str | Path, stream: int = 0) -> tuple[list[int], list[np.ndarray], Fraction]:
    """Ticks and [H, W, 3] pictures of a plain full decode in order, and the seconds of a tick."""
    with av.open(str(path)) as container:
        video = container.streams.video[stream]
        frames = list(container.decode(video))
        assert video.time_base is not None
        return (
            [frame.pts for frame in frames],
            [frame.to_ndarray(format="rgb24", threads=1) for frame in frames],
            video.time_base,
        )


@pytest.fixture(scope="session")
def encode_clip() -> Callable[..., Path]:
    return encode


@pytest.fixture(scope="session")
def full_decode() -> Callable[..., Any]:
    return decode_all


@pytest.fixture(scope="session")
def numbered() -> Callable[..., np.ndarray]:
    return picture


class CountingStore(AbstractFileSystem):
    """A store of bytes in memory, at `counting://`, that answers late and keeps account of what it is asked.

    Attributes:
        content: the files, by path.
        latency: seconds until an answer.
        requests: kind (`list`, `info` or `read`), path and number of bytes of each, in the order they ended.
        most: largest number of requests that were being answered at a time.
    """

    protocol = "counting"
    cachable = False
    content: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[tuple[str, str, int]]] = []
    latency: ClassVar[float] = 0.0
    most: ClassVar[int] = 0
    _lock, _now = Lock(), 0

    @contextmanager
    def answer(self, kind: str, path: str, size: int = 0) -> Iterator[None]:
        cls = type(self)
        with cls._lock:
            cls._now += 1
            cls.most = max(cls.most, cls._now)
        sleep(cls.latency)
        with cls._lock:
            cls._now -= 1
            cls.requests.append((kind, path, size))
        yield

    def _info(self, path: str) -> dict[str, Any]:
        if path in self.content:
            return {"name": path, "type": "file", "size": len(self.content[path])}
        if any(name.startswith(f"{path}/") for name in self.content):
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def info(self, path: str, **_: object) -> dict[str, Any]:
        with self.answer("info", path):
            return self._info(self._strip_protocol(path))

    def ls(self, path: str, detail: bool = True, **_: object) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        with self.answer("list", path):
            names = {name[len(path) + 1 :].split("/")[0] for name in self.content if name.startswith(f"{path}/")}
            found = [self._info(f"{path}/{name}") for name in sorted(names)]
            return found if detail else [entry["name"] for entry in found]

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        return CountedFile(self, path, mode, **settings)


class CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        data = self.fs.content[self.path][start:end]
        with self.fs.answer("read", self.path, len(data)):
            return data


@pytest.fixture
def counting() -> Iterator[type[CountingStore]]:
    fsspec.register_implementation("counting", CountingStore, clobber=True)
    yield CountingStore
    CountingStore.content.clear()
    CountingStore.requests.clear()
    CountingStore.latency, CountingStore.most = 0.0, 0
