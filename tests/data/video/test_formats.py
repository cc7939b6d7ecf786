"""What files out there bring: rotation, odd sizes, bit depths, ranges, matrices, HDR, pixel aspect, several streams,
and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image

from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError
from stdit_data.video import color
from stdit_data.video.deinterlace import TopField
from stdit_data.video.frames import read_frames
from stdit_data.video.probe import clip_errors, probe, read_image
from stdit_data.video.segments import Sampling
from stdit_data.video.stream import VideoStream


def first_picture(path: Path, stream: int | None = None) -> torch.Tensor:
    """[H, W, 3] of the first frame as we read it."""
    with VideoStream(str(path), stream) as video:
        frame = next(frame for _, frame in video.all_frames())
        return color.to_rgb(frame, VideoReformatter()).permute(1, 2, 0)


def quarters(width: int, height: int) -> np.ndarray:
    """Red, green / blue, white, clockwise from the top left."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (230, 20, 20)
    image[: height // 2, width // 2 :] = (20, 230, 20)
    image[height // 2 :, : width // 2] = (20, 20, 230)
    image[height // 2 :, width // 2 :] = (230, 230, 230)
    return image


def corners(picture: torch.Tensor) -> str:
    """The colours of top left, top right, bottom left, bottom right as letters."""
    height, width = picture.shape[:2]
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    points = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(names[tuple(int(c > 128) for c in picture[y, x].tolist())] for y, x in points)


@pytest.mark.parametrize(
    ("degrees", "mirror", "expected"),
    [
        (0, False, "rgbw"),
        (90, False, "gwrb"),  # counter-clockwise: the right side comes to the top
        (180, False, "wbgr"),
        (270, False, "brwg"),
        (0, True, "grwb"),
    ],
)
def test_rotation_and_mirroring(encode_clip: Any, tmp_path: Path, degrees: int, mirror: bool, expected: str) -> None:
    path = encode_clip(
        tmp_path / "clip.mp4", pictures=[quarters(64, 48)] * 3, rotation=(degrees, mirror), options={"crf": "4"}
    )
    picture = first_picture(path)
    assert corners(picture) == expected
    assert picture.shape[:2] == ((64, 48) if degrees in (90, 270) else (48, 64))
    facts = probe(str(path))
    assert (facts.height, facts.width) == tuple(picture.shape[:2])


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_range_and_depth(
    encode_clip: Any, tmp_path: Path, pixel_format: str, matrix: Colorspace, full: bool
) -> None:
    """A solid colour comes back, whatever it was coded as, at an odd size."""
    colour = (200, 60, 90)
    range_ = ColorRange.JPEG if full else ColorRange.MPEG
    tag = {Colorspace.ITU709: 1, Colorspace.ITU601: 6, Colorspace.BT2020: 9}[matrix]

    def tagged(stream: Any) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, int(range_)

    size = (65, 47) if pixel_format.startswith("yuv444") else (66, 48) if pixel_format == "yuv422p" else (66, 50)
    path = encode_clip(
        tmp_path / "clip.mkv",
        pictures=[np.full((size[1], size[0], 3), colour, np.uint8)] * 2,
        size=size,
        pixel_format=pixel_format,
        color=(int(matrix), int(range_)),
        options={"qp": "0"},
        prepare=tagged,
    )
    picture = first_picture(path)
    assert picture.shape == (size[1], size[0], 3)
    assert (picture.int() - torch.tensor(colour)).abs().max() <= 3


@pytest.mark.parametrize(("height", "matrix"), [(480, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_matrix_is_guessed_by_size(height: int, matrix: Colorspace) -> None:
    colour = (30, 180, 60)
    image = np.full((height, height + 2, 3), colour, np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG, threads=1
    )
    frame.colorspace, frame.color_range = 2, 0
    picture = color.to_rgb(frame, VideoReformatter())
    assert (picture[:, 9, 9].int() - torch.tensor(colour)).abs().max() <= 2


def coded(light: float, transfer: int) -> float:
    """Nits to a code value in [0, 1], from the standards' own formulas (inverse to what is tested)."""
    if transfer == color.PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        y = (light / 10000) ** m1
        return ((c1 + c2 * y) / (1 + c3 * y)) ** m2
    scene = (light / 1000) ** (1 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return (3 * scene) ** 0.5 if scene <= 1 / 12 else a * np.log(12 * scene - b) + c


@pytest.mark.parametrize("transfer", [color.PQ, color.HLG])
def test_hdr_greys(transfer: int) -> None:
    """Below half of SDR white, light is kept; above it rises on to white without clipping below 1000 nits."""
    nits = [0.0, 5.0, 25.0, 60.0, 100.0, 203.0, 500.0, 990.0, 1000.0]
    signal = torch.tensor([[[coded(n, transfer) for n in nits]]], dtype=torch.float32).repeat(3, 1, 1)
    mapped = color.tone_map(signal, transfer)
    assert (mapped.amax(0) - mapped.amin(0)).max() < 3e-3  # grey stays grey
    light = mapped[1, 0].double().pow(2.4)
    for n, shown in zip(nits[:5], light[:5].tolist(), strict=True):
        assert shown == pytest.approx(n / 203, rel=0.01, abs=2e-4)
    assert (light.diff() > 0).all()
    assert light[-2] < 1.0 <= light[-1] + 2e-3


def test_hdr_clip(encode_clip: Any, tmp_path: Path) -> None:
    """A PQ-tagged 10-bit file: grey of 60 nits comes out as that share of SDR white."""
    level = round(255 * coded(60, color.PQ))

    def tagged(stream: Any) -> None:
        context = stream.codec_context
        context.colorspace, context.color_range = 9, 1
        context.color_primaries, context.color_trc = 9, int(ColorTrc.SMPTE2084)

    path = encode_clip(
        tmp_path / "hdr.mp4",
        pictures=[np.full((64, 64, 3), level, np.uint8)] * 4,
        size=(64, 64),
        pixel_format="yuv420p10le",
        color=(int(Colorspace.BT2020), int(ColorRange.MPEG)),
        options={"qp": "0"},
        prepare=tagged,
    )
    assert probe(str(path)).hdr
    (tmp_path / "hdr.txt").write_text("grey")
    clip = open_videos(tmp_path, frames=2, height=32, width=32, interval=1).load(0, seed=0, epoch=0)
    shown = (clip.video + 1) / 2
    assert float(shown.mean()) ** 2.4 * 203 == pytest.approx(60, rel=0.05)


def test_pixel_aspect(encode_clip: Any, tmp_path: Path) -> None:
    """A circle stored with pixels twice as wide as high is a circle again."""
    y, x = np.mgrid[:64, :64]
    image = np.where(((x - 31.5) ** 2 * 4 + (y - 31.5) ** 2 < 24**2)[..., None], 235, 16).astype(np.uint8).repeat(3, -1)

    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = 2

    path = encode_clip(tmp_path / "clip.mp4", pictures=[image] * 2, size=(64, 64), prepare=wide, options={"crf": "2"})
    (tmp_path / "clip.txt").write_text("a disc")
    facts = probe(str(path))
    assert (facts.height, facts.width) == (64, 128)
    clip = open_videos(tmp_path, frames=1, height=64, width=128, interval=1).load(0, seed=0, epoch=0)
    disc = clip.video[0, 0] > 0
    across, down = int(disc.any(0).sum()), int(disc.any(1).sum())
    assert abs(across - down) <= 2
    assert down == pytest.approx(48, abs=2)


@pytest.mark.parametrize(
    ("codec", "extension", "options", "rotation"),
    [
        ("libx264", "mp4", {"x264-params": "tff=1", "qp": "4"}, None),
        ("libx264", "mp4", {"x264-params": "tff=1", "qp": "4"}, (90, False)),
        ("mpeg2video", "mpg", {"flags": "+ilme+ildct", "qmin": "2", "qmax": "2"}, None),
    ],
)
def test_interlaced(
    encode_clip: Any, tmp_path: Path, codec: str, extension: str, options: dict[str, str], rotation: Any
) -> None:
    """A square that moves between the fields is one square, not a comb of two, and keeps its proportions."""

    def woven(number: int) -> np.ndarray:
        image = np.full((96, 128, 3), 30, np.uint8)
        for field in (0, 1):
            left = 8 + 6 * number + 40 * field
            image[24 + field : 56 : 2, left : left + 32] = 220
        return image

    path = encode_clip(
        tmp_path / f"clip.{extension}",
        codec=codec,
        pictures=[woven(number) for number in range(6)],
        size=(128, 96),
        rate=25,
        options=options,
        rotation=rotation,
    )
    assert probe(str(path)).interlaced
    (tmp_path / "clip.txt").write_text("a square")
    upright = rotation is None
    height, width = (96, 128) if upright else (128, 96)
    dataset = open_videos(tmp_path, frames=6, height=height, width=width, interval=1, flip=False)
    video = dataset.load(0, seed=0, epoch=0).video.mean(0)
    for number, picture in enumerate(video if upright else torch.rot90(video, -1, (1, 2))):
        square = picture > 0
        columns, lines = square.any(0).nonzero().flatten(), square.any(1).nonzero().flatten()
        assert abs(int(columns[0]) - (8 + 6 * number)) <= 1
        assert abs(len(columns) - 32) <= 1
        assert abs(len(lines) - 32) <= 2
        assert int(square.sum()) >= 30 * 30  # whole, without gaps


def test_progressive_is_not_halved(encode_clip: Any, tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", frames=2)
    assert not probe(str(path)).interlaced
    with VideoStream(str(path)) as video:
        frame = next(frame for _, frame in video.all_frames())
        assert TopField("h264")(frame) is frame


def test_several_streams(tmp_path: Path) -> None:
    """Without a choice the stream that FFmpeg takes for the best (here the one marked as default), or the one asked."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = []
        for size in ((32, 32), (64, 48)):
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.disposition = Disposition.default if size[0] == 64 else Disposition.dub
            streams.append(stream)
        for _ in range(5):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(quarters(stream.width, stream.height), format="rgb24")
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    assert probe(str(path)).width == 64
    assert probe(str(path)).streams == 2
    assert probe(str(path), stream=0).width == 32
    assert first_picture(path, 1).shape == (48, 64, 3)
    with pytest.raises(ClipError, match="no video stream 2; expected 0 to 1"):
        probe(str(path), stream=2)


def truncated(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_truncated_with_the_index_first(encode_clip: Any, tmp_path: Path) -> None:
    """What is still there can be read; what isn't is an error that says so."""
    path = encode_clip(
        tmp_path / "clip.mp4", frames=120, gop=10, container_options={"movflags": "faststart"}, size=(128, 96)
    )
    truncated(path, 0.6)
    with VideoStream(str(path)) as video:
        assert len(read_frames(video, Sampling(4, interval=1), lambda _: torch.zeros(1), place=0.0).pictures) == 4
        with pytest.raises(DataError, match=r"truncated: 120 frames declared, data for \d+"):
            read_frames(video, Sampling(4, interval=1), lambda _: torch.zeros(1), place=1.0)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("none.mp4", None, "no such file"),
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"not a video at all, only words" * 40, "FFmpeg: Invalid data found"),
        ("text.png", b"not an image", "not an image"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, data: bytes | None, reason: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ClipError, match=reason) as caught:
        probe(str(tmp_path / name))
    assert caught.value.path.endswith(name)
    assert "\n" not in str(caught.value)


def test_truncated_with_the_index_last(encode_clip: Any, tmp_path: Path) -> None:
    path = truncated(encode_clip(tmp_path / "clip.mp4"), 0.7)
    with pytest.raises(ClipError, match="truncated: the index at the end of the mp4 is missing"):
        probe(str(path))


def test_damage_within(encode_clip: Any, tmp_path: Path) -> None:
    """Overwritten data in the middle: never a wrong picture without a word, at least where FFmpeg notices."""
    path = encode_clip(tmp_path / "clip.mkv", frames=60, gop=60, size=(128, 96), b_frames=0)
    with VideoStream(str(path)) as video:
        sound = read_frames(
            video, Sampling(60, interval=1), lambda f: torch.from_numpy(f.to_ndarray(format="rgb24", threads=1))
        )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ClipError), clip_errors(str(path)), VideoStream(str(path)) as video:
        taken = read_frames(
            video, Sampling(60, interval=1), lambda f: torch.from_numpy(f.to_ndarray(format="rgb24", threads=1))
        )
        different = [not torch.equal(a, b) for a, b in zip(taken.pictures, sound.pictures, strict=True)]
        pytest.fail(f"{sum(different)} wrong frames went through")


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(ClipError, match="holds no video stream"):
        probe(str(path))


def test_animated_gif(encode_clip: Any, full_decode: Any, tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.gif", codec="gif", frames=8, rate=10, pixel_format="rgb8", b_frames=0)
    assert probe(str(path)).codec == "gif"
    _, pictures, _ = full_decode(path)
    with VideoStream(str(path)) as video:
        taken = read_frames(
            video, Sampling(3, interval=2), lambda f: torch.from_numpy(f.to_ndarray(format="rgb24", threads=1))
        )
    assert all(np.array_equal(got, pictures[2 * j]) for j, got in enumerate(taken.pictures))


def test_images(tmp_path: Path) -> None:
    """Orientation tags, transparency on white, 16-bit grey, CMYK, palettes."""
    quarters_ = Image.fromarray(quarters(16, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    quarters_.save(tmp_path / "turned.png", exif=exif)
    assert corners(read_image(str(tmp_path / "turned.png")).permute(1, 2, 0)) == "brwg"
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(str(tmp_path / "clear.png")) == 255).all()
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(str(tmp_path / "deep.png")).int() - 127).abs().max() <= 1
    quarters_.convert("CMYK").save(tmp_path / "print.jpg", quality=98)
    assert corners(read_image(str(tmp_path / "print.jpg")).permute(1, 2, 0)) == "rgbw"
    quarters_.quantize(16).save(tmp_path / "palette.png")
    assert corners(read_image(str(tmp_path / "palette.png")).permute(1, 2, 0)) == "rgbw"
    assert probe(str(tmp_path / "turned.png")).height == 16
