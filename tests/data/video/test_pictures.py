"""What a frame looks like: palettes after seeks, alpha, animations, crops, grey, and absurd shapes."""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from PIL import Image

from stdit_data.buckets import Bucket
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError
from stdit_data.manifests.format import read_manifest
from stdit_data.manifests.validate import validate
from stdit_data.transforms import Fit
from stdit_data.video import color
from stdit_data.video import stream as stream_module
from stdit_data.video.probe import probe
from stdit_data.video.read import read_picture, read_video
from stdit_data.video.stream import VideoStream

FILES = Path(__file__).parent / "files"


def write_palette_video(path: Path, *, codec: str = "rawvideo") -> Path:
    """Raw video whose palette is sent once, at the start."""
    y, x = np.mgrid[:48, :64]
    palette = np.stack([np.full(256, 255), np.arange(256), 255 - np.arange(256), np.arange(256) * 7 % 256], axis=-1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for number in range(30):
            pixels = ((x + y + 3 * number) % 256).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray((pixels, palette.astype(np.uint8)), format="pal8")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("extension", ["avi", "mov"])
def test_seeking_keeps_the_palette(full_decode: Any, tmp_path: Path, extension: str) -> None:
    path = write_palette_video(tmp_path / f"clip.{extension}")
    ticks, pictures, _ = full_decode(path)
    for number in (1, 7, 20, 29):
        with VideoStream(str(path)) as video:
            _, frame = next(video.frames_from(ticks[number]))
        assert np.array_equal(frame.to_ndarray(format="rgb24", threads=1), pictures[number])


def test_thorough_validation_compares_seeks_with_a_full_decode(
    encode_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a seek loses is found, and a sound video passes."""
    write_palette_video(tmp_path / "palette.avi")
    encode_clip(tmp_path / "sound.mkv")
    for name in ("palette", "sound"):
        (tmp_path / f"{name}.txt").write_text("a clip")
    manifest = read_manifest(str(tmp_path))
    assert not validate(manifest, thorough=True, workers=1).bad

    read_header = VideoStream._read_header

    def careless(video: VideoStream) -> None:
        read_header(video)
        video._seeks = True

    monkeypatch.setattr(stream_module.VideoStream, "_read_header", careless)
    (finding,) = validate(manifest, thorough=True, workers=1).bad
    assert finding.path.endswith("palette.avi")
    assert "gives another picture than a full decode" in finding.problems[0]


def half_clear() -> np.ndarray:
    """[48, 64, 4]: red that is opaque on the left, half transparent in the middle and clear on the right."""
    image = np.zeros((48, 64, 4), np.uint8)
    image[..., 0] = 200
    image[:, :21, 3], image[:, 21:42, 3] = 255, 128
    return image


RED, PINK, WHITE = (200, 0, 0), (227, 127, 127), (255, 255, 255)


def check_on_white(path: Path) -> None:
    video, fps = read_video(str(path), 48, 64)
    shown = ((video + 1) * 127.5).round()
    assert (video.shape[1], fps) == (12, 10.0)
    for at, expected in ((8, RED), (31, PINK), (56, WHITE)):
        assert (shown[:, 5, 24, at] - torch.tensor(expected)).abs().max() <= 1, path.name


@pytest.mark.parametrize(("codec", "pixel_format"), [("png", "rgba"), ("qtrle", "argb"), ("ffv1", "yuva444p")])
def test_videos_lie_on_white(tmp_path: Path, codec: str, pixel_format: str) -> None:
    path = tmp_path / ("clip.mkv" if codec == "ffv1" else "clip.mov")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(half_clear(), format="rgba").reformat(format=pixel_format, threads=1)
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    check_on_white(path)


@pytest.mark.parametrize("name", ["clip.webp", "clip.png"])
def test_animated_pictures_are_videos(tmp_path: Path, name: str) -> None:
    pictures = [Image.fromarray(half_clear()) for _ in range(12)]
    for number, picture in enumerate(pictures):
        picture.putpixel((number, 0), (0, 0, 255, 255))  # equal frames would be merged
    path = tmp_path / name
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, lossless=True, exact=True)
    check_on_white(path)
    facts = probe(str(path))
    assert (facts.frames, facts.fps, facts.width, facts.height) == (12, 10.0, 64, 48)
    assert facts.duration == pytest.approx(1.2)
    (tmp_path / "clip.txt").write_text("red")
    manifest = read_manifest(str(tmp_path))
    assert not validate(manifest, thorough=True, workers=1).bad
    dataset = open_videos(
        tmp_path, interval=1, flip=False, buckets=[Bucket(1, 48, 64), Bucket(8, 48, 64)], place="start"
    )
    assert dataset.bucket(0) == Bucket(8, 48, 64)
    video = dataset.load(0, seed=0, epoch=0).video
    blue = (video[2] - video[0])[:, 0].argmax(1)
    assert blue.tolist() == list(range(8))
    with pytest.raises(ClipError, match="an animation, expected a single picture"):
        read_picture(str(path), 48, 64)


def test_still_pictures_stay_pictures(tmp_path: Path) -> None:
    for name in ("a.webp", "b.png", "c.jpg"):
        Image.fromarray(half_clear()).convert("RGB" if name == "c.jpg" else "RGBA").save(tmp_path / name)
        assert probe(str(tmp_path / name)).frames == 1
        with pytest.raises(ClipError, match="expected a video, found an image"):
            read_video(str(tmp_path / name), 48, 64)
    shown = ((read_picture(str(tmp_path / "b.png"), 48, 64) + 1) * 127.5).round()
    assert shown[:, 24, 56].tolist() == list(WHITE)


def test_alpha_of_webm() -> None:
    """A red square on nothing: FFmpeg's own VP9 decoder leaves the alpha channel out."""
    path = FILES / "alpha_vp9.webm"
    facts = probe(str(path))
    assert (facts.frames, facts.pixel_format) == (12, "yuva420p")
    video, _ = read_video(str(path), 120, 160)
    shown = ((video + 1) * 127.5).round()
    assert shown[:, 6, 2, 2].tolist() == list(WHITE)
    assert (shown[:, -1, 60, 80] - torch.tensor((200, 40, 40))).abs().max() <= 3
    with VideoStream(str(path)) as video_stream:
        ticks = video_stream.timestamps()
        whole = [frame.to_ndarray(format="rgba") for _, frame in video_stream.all_frames()]
        sought = [frame.to_ndarray(format="rgba") for _, frame in islice(video_stream.frames_from(ticks[7]), 2)]
    assert np.array_equal(sought, whole[7:9])


def test_the_fourth_byte_of_avi_is_no_alpha(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgra"
        image = half_clear()
        image[..., 3] = 0
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba").reformat(format="bgra", threads=1)))
        out.mux(stream.encode())
    video, _ = read_video(str(path), 48, 64)
    assert ((video[:, 0, 24, 24] + 1) * 127.5).round().tolist() == list(RED)


def test_crop_of_matroska() -> None:
    """PixelCropLeft 40 and PixelCropTop 20 of 160x120; the tracks are described at the end of this file."""
    path = FILES / "crop.mkv"
    facts = probe(str(path))
    assert (facts.width, facts.height) == (120, 100)
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24", threads=1)
    with VideoStream(str(path)) as video:
        _, frame = next(video.frames_from(video.timestamps()[5]))
        assert (frame.width, frame.height) == (120, 100)
        first = color.to_rgb(next(frame for _, frame in video.all_frames()), VideoReformatter()).permute(1, 2, 0)
    assert np.abs(first.numpy()[8:-8, 8:-8].astype(int) - stored[28:-8, 48:-8].astype(int)).mean() < 2


def add_clean_aperture(path: Path, width: int, height: int, right: int, down: int) -> None:
    """Puts a `clap` box at the end of the sample entry: the size shown, and where its centre lies off the middle."""
    data = bytearray(path.read_bytes())
    box = struct.pack(">I4s4IiIiI", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    entry = data.index(b"avc1", data.index(b"stsd")) - 4
    end = entry + struct.unpack_from(">I", data, entry)[0]
    at = 0
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):  # each holds the next
        at = data.index(kind, at)
        struct.pack_into(">I", data, at - 4, struct.unpack_from(">I", data, at - 4)[0] + len(box))
    data[end:end] = box
    path.write_bytes(data)


def test_clean_aperture_of_mp4(encode_clip: Any, full_decode: Any, tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", frames=6, size=(64, 48))
    add_clean_aperture(path, 40, 32, 4, -2)
    facts = probe(str(path))
    assert (facts.width, facts.height, facts.frames) == (40, 32, 6)
    _, pictures, _ = full_decode(path)
    with VideoStream(str(path)) as video:
        frame = next(frame for _, frame in video.all_frames())
    cut = frame.to_ndarray(format="rgb24", threads=1)
    assert np.abs(cut[2:-2, 2:-2].astype(int) - pictures[0][8:-12, 18:-10].astype(int)).max() <= 8


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
@pytest.mark.parametrize("tag", [ColorRange.MPEG, ColorRange.JPEG, ColorRange.UNSPECIFIED])
def test_grey(pixel_format: str, tag: ColorRange) -> None:
    """As tagged; full range without a tag."""
    deep = pixel_format != "gray"
    levels = np.array([[0, 16, 91, 126, 235, 255]], np.uint16).repeat(4, 0) * (4 if deep else 1)
    frame = av.VideoFrame.from_ndarray(levels if deep else levels.astype(np.uint8), format=pixel_format)
    frame.color_range = int(tag)
    shown = color.to_rgb(frame, VideoReformatter())[:, 2].tolist()
    expected = [0, 0, 87, 128, 255, 255] if tag == ColorRange.MPEG else [0, 16, 91, 126, 235, 255]
    assert shown[0] == shown[1] == shown[2]
    assert np.abs(np.subtract(shown[0], expected)).max() <= 1


@pytest.mark.parametrize("aspect", [Fraction(1, 65535), Fraction(65535), Fraction(1, 11), Fraction(11)])
def test_absurd_pixel_aspect(encode_clip: Any, tmp_path: Path, aspect: Fraction) -> None:
    def stretched(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = 2

    path = encode_clip(tmp_path / "clip.mp4", prepare=stretched)
    data = bytearray(path.read_bytes())
    struct.pack_into(">II", data, data.index(b"pasp") + 4, aspect.numerator, aspect.denominator)
    path.write_bytes(data)
    reason = f"pixel aspect ratio {aspect.numerator}:{aspect.denominator}, expected 1:10 to 10:1"
    with pytest.raises(ClipError, match=reason):
        probe(str(path))
    (tmp_path / "clip.txt").write_text("a clip")
    with pytest.raises(ClipError, match=reason):
        open_videos(tmp_path, frames=2, height=32, width=32).load(0, seed=0, epoch=0)


@pytest.mark.parametrize("size", [(3, 400), (4000, 2)])
def test_absurd_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "long.png")
    with pytest.raises(ClipError, match="one side is over 100 times as long as the other"):
        probe(str(tmp_path / "long.png"))
    with pytest.raises(DataError, match="one side is over 100 times as long as the other"):
        Fit(256, 256)(torch.zeros(3, size[1], size[0], dtype=torch.uint8))
