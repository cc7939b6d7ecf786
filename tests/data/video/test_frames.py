"""The frames read are exactly those of a full decode, chosen by timestamp: over codecs, containers, GOPs, B-frames,
rates, start times and variable rates. The full decode is plain PyAV's, without any code of ours."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stdit_data.errors import DataError
from stdit_data.video.frames import read_frames
from stdit_data.video.segments import Sampling, Segment
from stdit_data.video.stream import VideoStream

FORMATS = {
    "libx264": ["mp4", "mkv", "mov", "ts"],
    "libx265": ["mp4", "mkv"],
    "mpeg4": ["mp4", "avi", "mkv"],
    "libvpx-vp9": ["webm", "mp4"],
    "libsvtav1": ["mp4", "webm"],
}
OPTIONS: dict[str, list[dict[str, str]]] = {
    "libx264": [
        {},
        {"preset": "medium", "x264-params": "open-gop=1:b-pyramid=normal"},
        {"x264-params": "intra-refresh=1"},
    ],
    "libx265": [{}, {"x265-params": "open-gop=1"}],
    "libvpx-vp9": [{}, {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}],
}
NAMES = {"ts": "mpegts", "mkv": "matroska"}
RATES = [Fraction(30), Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(8)]


@st.composite
def encodings(draw: st.DrawFn, *, codecs: list[str] | None = None) -> dict[str, Any]:
    codec = draw(st.sampled_from(codecs or [name for name in FORMATS if name in av.codecs_available]))
    extension = draw(st.sampled_from(FORMATS[codec]))
    # FFmpeg itself opens no shorter transport stream, and x265 writes random times for a few frames alone.
    frames = draw(st.integers(16 if extension == "ts" else 6 if codec == "libx265" else 1, 48))
    varying = draw(st.booleans())
    movflags = draw(st.sampled_from(["", "faststart", "frag_keyframe+empty_moov"]))
    return {
        "codec": codec,
        "extension": extension,
        "container": NAMES.get(extension),
        "container_options": {"movflags": movflags} if movflags and extension in ("mp4", "mov") else {},
        "frames": frames,
        "rate": draw(st.sampled_from(RATES)),
        "gop": draw(st.sampled_from([1, 5, 12, 250])),
        "b_frames": draw(st.integers(0, 3)),
        "start": draw(st.sampled_from([0, 0, 1, 9, 75])),
        "durations": draw(st.lists(st.sampled_from([1, 1, 2, 5]), min_size=frames, max_size=frames))
        if varying
        else None,
        "options": draw(st.sampled_from(OPTIONS.get(codec, [{}]))),
    }


def build(encode_clip: Any, folder: Path, encoding: dict[str, Any]) -> Path:
    settings_ = dict(encoding)
    return encode_clip(folder / f"clip.{settings_.pop('extension')}", **settings_)


def as_tensor(frame: Any) -> torch.Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))


def same(picture: torch.Tensor, expected: np.ndarray) -> bool:
    return np.array_equal(picture.numpy(), expected)


common = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would encode hundreds of clips; the example tells enough
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(common, max_examples=40)
@given(encoding=encodings(), where=st.floats(0, 1), shift=st.sampled_from([-1, 0, 1]))
def test_frames_from_any_tick(encode_clip: Any, full_decode: Any, tmp_path: Path, encoding, where, shift) -> None:
    path = build(encode_clip, tmp_path, encoding)
    ticks, pictures, _ = full_decode(path)
    with VideoStream(str(path)) as video:
        if not video.timed:  # AVI with B-frames: counted, not timed
            ticks = list(range(len(pictures)))
        assert video.timestamps() == ticks
        tick = ticks[int(where * (len(ticks) - 1))] + shift
        first = max(0, bisect_right(ticks, tick) - 1)
        read = list(islice(video.frames_from(tick), 4))
    assert [at for at, _ in read] == ticks[first : first + 4]
    for (_, frame), expected in zip(read, pictures[first:], strict=False):
        assert same(as_tensor(frame), expected)


@settings(common, max_examples=40)
@given(
    encoding=encodings(),
    count=st.integers(1, 8),
    interval=st.integers(1, 4),
    place=st.floats(0, 1),
    hold=st.booleans(),
)
def test_every_nth_frame(
    encode_clip: Any, full_decode: Any, tmp_path: Path, encoding, count, interval, place, hold
) -> None:
    path = build(encode_clip, tmp_path, encoding)
    ticks, pictures, base = full_decode(path)
    need, total = (count - 1) * interval + 1, len(pictures)
    sampling = Sampling(count, interval=interval, short="hold" if hold else "skip")
    with VideoStream(str(path)) as video:
        if total < need and not hold:
            with pytest.raises(DataError, match=f"too short: {total} frames, {need} needed"):
                read_frames(video, sampling, as_tensor, place=place)
            return
        taken = read_frames(video, sampling, as_tensor, place=place)
        timed, rate = video.timed, video.rate
    assert len(taken.pictures) == count
    if total < need:
        numbers = [min(j * interval, total - 1) for j in range(count)]
    else:
        # With a variable rate the start is where the average rate puts it, so any of the possible ones is right.
        starts = [i for i in range(total - need + 1) if same(taken.pictures[0], pictures[i])]
        assert starts, "the first frame is none of those that leave enough after it"
        if encoding["durations"] is None and timed and encoding["start"] == 0:
            assert int(place * (total - need + 1)) in (*starts, total - need + 1)
        numbers = [starts[0] + j * interval for j in range(count)]
    assert all(same(got, pictures[i]) for got, i in zip(taken.pictures, numbers, strict=True))
    if timed:
        expected = [float((ticks[i] - ticks[0]) * base) for i in numbers]
        assert taken.times == pytest.approx(expected, abs=1e-9)
    assert taken.fps == pytest.approx(float(rate) / interval)


@settings(common, max_examples=40)
@given(
    encoding=encodings(codecs=["libx264", "libvpx-vp9"]),
    count=st.integers(1, 8),
    fps=st.sampled_from([3.0, 8.0, 12.5, 30.0, 60.0]),
    place=st.floats(0, 1),
)
def test_frames_at_a_rate(encode_clip: Any, full_decode: Any, tmp_path: Path, encoding, count, fps, place) -> None:
    path = build(encode_clip, tmp_path, encoding)
    ticks, pictures, base = full_decode(path)
    with VideoStream(str(path)) as video:
        try:
            taken = read_frames(video, Sampling(count, fps=fps), as_tensor, place=place)
        except DataError as error:
            assert "too short" in str(error)
            assert (ticks[-1] - ticks[0]) * base < (count - 1) / fps + 1 / video.rate
            return
    seconds = [float((tick - ticks[0]) * base) for tick in ticks]
    tick = float(base)
    numbers = [int(np.argmin(np.abs(np.subtract(seconds, at)))) for at in taken.times]
    assert all(same(got, pictures[i]) for got, i in zip(taken.pictures, numbers, strict=True))
    # At each moment, start + j / fps for one start, the frame on screen (to a tick's rounding).
    low = max(seconds[i] - j / fps for j, i in enumerate(numbers)) - 2 * tick
    high = min((seconds[i + 1] if i + 1 < len(seconds) else np.inf) - j / fps for j, i in enumerate(numbers)) + 2 * tick
    assert low < high
    assert taken.fps == fps


@pytest.mark.parametrize(("segment", "numbers"), [
    (Segment(start=0.5, end=1.0), range(15, 30)),
    (Segment(start_frame=7, end_frame=11), range(7, 11)),
    (Segment(end=0.2), range(6)),
    (Segment(start_frame=33), range(33, 40)),
    (Segment(start=1.3333, end=99), range(40 - 0, 40)),
])  # fmt: skip
def test_segments(encode_clip: Any, full_decode: Any, tmp_path: Path, segment: Segment, numbers: range) -> None:
    path = encode_clip(tmp_path / "clip.mkv", rate=30, frames=40)
    _, pictures, _ = full_decode(path)
    with VideoStream(str(path)) as video:
        if not numbers:
            with pytest.raises(DataError, match=r"no frames in the segment, 1\.3333 to 99 s; the video has 40 frames"):
                read_frames(video, Sampling(1, interval=1), as_tensor, segment=segment)
            return
        for place in (0.0, 1.0):
            taken = read_frames(video, Sampling(len(numbers), interval=1), as_tensor, segment=segment, place=place)
            assert all(same(got, pictures[i]) for got, i in zip(taken.pictures, numbers, strict=True))
        with pytest.raises(DataError, match=f"too short: {len(numbers)} frames, {len(numbers) + 1} needed"):
            read_frames(video, Sampling(len(numbers) + 1, interval=1), as_tensor, segment=segment)
        held = read_frames(video, Sampling(len(numbers) + 2, interval=1, short="hold"), as_tensor, segment=segment)
        assert same(held.pictures[-1], pictures[numbers[-1]])


def test_every_possible_start_is_drawn_about_equally(encode_clip: Any, tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", frames=12)
    with VideoStream(str(path)) as video:
        times = [
            read_frames(video, Sampling(3, interval=3), as_tensor, place=(n + 0.5) / 60).times[0] * 30
            for n in range(60)
        ]
    assert np.bincount(np.rint(times).astype(int)).tolist() == [10] * 6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frames": 0, "interval": 1}, "frames 0"),
        ({"frames": 4}, "expected exactly one of the two"),
        ({"frames": 4, "interval": 3, "fps": 8.0}, "expected exactly one of the two"),
        ({"frames": 4, "interval": 0}, "interval 0"),
        ({"frames": 4, "fps": 0.0}, "fps 0.0"),
        ({"frames": 4, "interval": 1, "short": "loop"}, "'skip' or 'hold'"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Sampling(**values)


def test_cuts_count_frames() -> None:
    """A cut's length in frames, in seconds or in frames, whatever decimals it is written in."""
    assert Segment().frames(30, 100) == 100
    assert Segment(start=1.0, end=2.0).frames(30, 100) == 30
    assert Segment(start=0.333, end=0.667).frames(30, 100) == 10  # frames 10 to 19
    assert Segment(start_frame=10, end_frame=25).frames(24, 100) == 15
    assert Segment(start_frame=90, end_frame=250).frames(24, 100) == 10
    assert Segment(start=50).frames(30, 100) == 0
    parts = [Segment(start=round(a / 24, 3), end=round(b / 24, 3)) for a, b in pairwise([0, 7, 19, 48])]
    assert sum(part.frames(24, 48) for part in parts) == 48  # scenes that follow one another share no frame
