"""The number of frames is that of a full decode, whatever a container says, and every one of them can be read."""

from __future__ import annotations

import itertools
import struct
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.error import FFmpegError
from av.stream import Disposition

from stdit_data.buckets import Bucket
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError
from stdit_data.manifests.format import read_manifest
from stdit_data.manifests.validate import validate
from stdit_data.video import stream as stream_module
from stdit_data.video.frames import read_frames
from stdit_data.video.probe import probe
from stdit_data.video.segments import Sampling, Segment
from stdit_data.video.stream import VideoStream


def as_tensor(frame: Any) -> torch.Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))


def decoded(path: Path, *, from_key: bool = False) -> list[np.ndarray]:
    """What FFmpeg shows, going on after errors as players do; optionally from the first key frame on."""
    frames: list[Any] = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(FFmpegError):
                frames += [frame for frame in packet.decode() if not frame.is_corrupt]
    if from_key:
        key = next(frame.pts for frame in frames if frame.key_frame)
        frames = [frame for frame in frames if frame.pts >= key]
    return [as_tensor(frame).numpy() for frame in frames]


def check_reading(path: Path, pictures: list[np.ndarray]) -> None:
    """Every frame can be read after opening the file anew, and is that of a full decode."""
    count = len(pictures)
    assert probe(str(path)).frames == count
    for number in sorted({*range(0, count, 4), count - 2, count - 1}):
        with VideoStream(str(path)) as video:
            ticks = video.timestamps()
            assert len(ticks) == count
            read = list(itertools.islice(video.frames_from(ticks[number]), 2))
        for (_, frame), expected in zip(read, pictures[number:], strict=False):
            assert np.array_equal(as_tensor(frame).numpy(), expected)
    for first, length in ((0, 4), (count // 4, 3), (count // 2, 5), (count - 3, 3)):
        with VideoStream(str(path)) as video:
            if video.rate != Fraction(25):
                return  # segments in frames are exact for constant rates
            segment = Segment(start_frame=first, end_frame=first + length)
            clip = read_frames(video, Sampling(length, interval=1), as_tensor, segment=segment)
        for j, got in enumerate(clip.pictures):
            assert np.array_equal(got.numpy(), pictures[first + j]), f"frame {j} of {first} to {first + length}"


def check_all(path: Path, count: int) -> None:
    pictures = decoded(path)
    assert len(pictures) == count
    check_reading(path, pictures)


def remux(source: Path, target: Path, *, shift: int = 0, skip: int = 0, audio: float = 0.0, **options: Any) -> Path:
    """Copies the packets of a video, without the first ones, later by ticks, beside seconds of silence."""
    with av.open(str(source)) as given, av.open(str(target), "w", **options) as out:
        video = given.streams.video[0]
        copy = out.add_stream_from_template(video)
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio else None
        for packet in itertools.islice((p for p in given.demux(video) if p.size), skip, None):
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = copy
            out.mux(packet)
        if sound is not None:
            for number in range(int(audio * 8000 / 1024)):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 8000, number * 1024, Fraction(1, 8000)
                out.mux(sound.encode(frame))
            out.mux(sound.encode())
    return target


@pytest.mark.parametrize("extension", ["mkv", "flv", "ts", "mp4", "mov"])
@pytest.mark.parametrize("late", [False, True])
def test_audio_longer_than_the_video(encode_clip: Any, tmp_path: Path, extension: str, late: bool) -> None:
    source = encode_clip(tmp_path / "video.mp4", rate=25, frames=30)
    path = remux(source, tmp_path / f"clip.{extension}", audio=9, shift=25600 if late else 0)
    check_all(path, 30)
    facts = probe(str(path))
    assert facts.fps == 25
    assert facts.duration == pytest.approx(1.2, abs=0.002)


@pytest.mark.parametrize("extension", ["mkv", "webm", "flv", "mp4", "ts"])
def test_variable_rates(encode_clip: Any, tmp_path: Path, extension: str) -> None:
    """Fourteen frames in four seconds are fourteen frames, at 3.5 a second."""
    path = encode_clip(
        tmp_path / f"clip.{extension}",
        codec="libvpx-vp9" if extension == "webm" else "libx264",
        container={"mkv": "matroska", "ts": "mpegts"}.get(extension),
        rate=30,
        frames=14,
        durations=[1, 1, 1, 1, 90, 1, 1, 1, 1, 1, 17, 1, 1, 1],
    )
    check_all(path, 14)
    facts = probe(str(path))
    assert facts.fps == pytest.approx(3.5, rel=0.03)
    assert facts.duration == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov", "dash+frag_keyframe"])
def test_fragments(encode_clip: Any, tmp_path: Path, flags: str) -> None:
    """The index at the start of a fragmented mp4 knows the first fragment, or none."""
    path = encode_clip(tmp_path / "clip.mp4", frames=40, container_options={"movflags": flags})
    check_all(path, 40)


def test_hidden_references_are_no_frames(encode_clip: Any, tmp_path: Path) -> None:
    """A VP8 packet may hold a picture that others refer to and that is never shown (alternate references)."""
    source = encode_clip(tmp_path / "source.webm", codec="libvpx", frames=30, rate=25, gop=100)
    path = tmp_path / "clip.webm"
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
            hidden = av.Packet(bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:])
            hidden.pts, hidden.dts, hidden.time_base = packet.pts + 1, packet.dts + 1, packet.time_base
            for wanted in (packet, hidden) if number % 5 == 4 else (packet,):
                wanted.stream = copy
                out.mux(wanted)
    with av.open(str(path)) as container:
        assert sum(bool(packet.size) for packet in container.demux(video=0)) == 36
    check_all(path, 30)


def test_an_edit_list_hides_frames(encode_clip: Any, tmp_path: Path) -> None:
    """A cut that copies packets from the key frame before it on, as `ffmpeg -ss 0.4 -c copy` makes it."""
    source = encode_clip(tmp_path / "whole.mp4", rate=25, frames=60, gop=30)
    path = remux(source, tmp_path / "cut.mp4", shift=-13 * 512, options={"avoid_negative_ts": "disabled"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 60
    check_all(path, 47)
    with VideoStream(str(path)) as video:
        assert video.duration == pytest.approx(47 / 25, abs=0.03)


def replace_edits(path: Path, edits: list[tuple[int, int]]) -> None:
    """Writes an edit list of (frames, first frame), at 25 frames a second; -1 as the first frame is a pause."""
    data = bytearray(path.read_bytes())
    at = data.index(b"edts") - 4
    end = at + struct.unpack_from(">I", data, at)[0]
    rows = b"".join(struct.pack(">IiHH", 40 * n, 512 * first if first >= 0 else -1, 1, 0) for n, first in edits)
    edit_list = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
    box = struct.pack(">I4s", 8 + len(edit_list), b"edts") + edit_list
    data[at:end] = box
    for kind in (b"moov", b"trak"):
        size = data.index(kind) - 4
        struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + len(box) - (end - at))
    path.write_bytes(data)


@pytest.mark.parametrize(
    "edits",
    [
        [(20, 10)],
        [(45, 0)],
        [(10, 5), (15, 30)],  # two parts
        [(20, 0), (20, 0)],  # shown twice
        [(30, 30), (30, 0)],  # the other way round
        [(25, -1), (20, 13)],  # late, and cut
        [(10, 0), (25, -1), (20, 20)],  # with a pause
    ],
)
def test_edit_lists(encode_clip: Any, tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    path = encode_clip(tmp_path / "clip.mp4", rate=25, frames=60, b_frames=0)
    replace_edits(path, edits)
    pictures = decoded(path)
    check_reading(path, pictures)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "ffv1"])
def test_avi_without_reordered_frames(encode_clip: Any, tmp_path: Path, codec: str) -> None:
    path = encode_clip(tmp_path / "clip.avi", codec=codec, b_frames=0, rate=25, frames=50)
    check_all(path, 50)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
@pytest.mark.parametrize("extension", ["ts", "mp4"])
@pytest.mark.parametrize("open_gop", [False, True])
def test_begun_in_the_middle_of_a_group(
    encode_clip: Any, tmp_path: Path, codec: str, extension: str, open_gop: bool
) -> None:
    """Frames are counted from the first that can be shown."""
    options = {"libx264": {"x264-params": "open-gop=1"}, "libx265": {"x265-params": "open-gop=1"}}
    container = {"ts": "mpegts", "mkv": "matroska"}.get(extension)
    source = encode_clip(
        tmp_path / f"whole.{extension}",
        codec=codec,
        container=container,
        rate=25,
        frames=60,
        options=options.get(codec, {}) if open_gop else {},
    )
    shift = -17 * 512 if extension == "mp4" else 0
    path = remux(source, tmp_path / f"clip.{extension}", skip=17, shift=shift, format=container)
    pictures = decoded(path, from_key=True)
    assert 30 < len(pictures) < 43
    check_reading(path, pictures)


def test_bytes_cut_out_of_a_transport_stream(encode_clip: Any, tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.ts", container="mpegts", rate=25, frames=120, size=(160, 120), gop=24)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    pictures = decoded(path, from_key=True)
    assert 40 < len(pictures) < 90
    check_reading(path, pictures)


@pytest.mark.parametrize("second", [40, 7])
def test_joined_transport_streams(encode_clip: Any, tmp_path: Path, second: int) -> None:
    """Where timestamps start again, frames are counted, and all of them can be read."""
    parts = [
        encode_clip(tmp_path / f"{frames}.ts", container="mpegts", rate=25, frames=frames)
        for frames in (40, 16 + second)
    ]
    path = tmp_path / "clip.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    check_all(path, 56 + second)
    assert not [f.problems for f in validate_folder(path).bad]


def validate_folder(path: Path) -> Any:
    path.with_suffix(".txt").write_text("a clip")
    (folder := path.parent / "set").mkdir()
    for file in (path, path.with_suffix(".txt")):
        file.rename(folder / file.name)
    return validate(read_manifest(str(folder)), thorough=True, workers=1)


@pytest.mark.parametrize("extension", ["m4a", "mp4"])
def test_a_cover_is_no_video(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"sound.{extension}"
    with av.open(str(path), "w", format="mp4" if extension == "m4a" else None) as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        cover = out.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
        out.mux(cover.encode(picture))
        out.mux(cover.encode())
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, number * 1024, Fraction(1, 8000)
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    with pytest.raises(ClipError, match="holds no video stream, only a cover picture"):
        probe(str(path))


def test_clips_with_long_audio_train_in_the_bucket_that_they_fill(encode_clip: Any, tmp_path: Path) -> None:
    for number in range(3):
        source = encode_clip(tmp_path / "video.mp4", rate=25, frames=30)
        remux(source, tmp_path / f"{number}.mkv", audio=9)
        source.unlink()
        (tmp_path / f"{number}.txt").write_text("a clip")
    dataset = open_videos(tmp_path, interval=1, buckets=[Bucket(16, 32, 32), Bucket(64, 32, 32)])
    assert {dataset.bucket(index) for index in range(3)} == {Bucket(16, 32, 32)}
    assert all(
        dataset.load(index, seed=0, epoch=epoch).video.shape[1] == 16 for index in range(3) for epoch in range(3)
    )


def test_a_file_is_read_through_once(encode_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting costs a pass over the packets: none for an index, and none again until the file changes."""
    passes: list[str] = []
    read_packets = stream_module.read_packets
    monkeypatch.setattr(stream_module, "read_packets", lambda *given: passes.append("") or read_packets(*given))
    with VideoStream(str(encode_clip(tmp_path / "clip.mp4"))) as video:
        assert (video.count(), len(passes)) == (40, 0)
    path = encode_clip(tmp_path / "clip.mkv")
    for _ in range(3):
        with VideoStream(str(path)) as video:
            assert (video.count(), len(passes)) == (40, 1)
    encode_clip(path, frames=20)
    with VideoStream(str(path)) as video:
        read_frames(video, Sampling(4, interval=1), as_tensor, segment=Segment(start=0.1, end=0.4))
        assert len(passes) == 1  # a segment with an end needs no count
        assert (video.count(), len(passes)) == (20, 2)
