"""Writing: mp4 files, contact sheets, walls, previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stdit_data import labels
from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.errors import ClipError, DataError
from stdit_data.labels import SMALL, draw_label, missing_characters
from stdit_data.preview import contact_sheet, preview, video_wall
from stdit_data.video.write import write_mp4


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    """[3, T, H, W] that an encoder can keep: slow gradients that change with time."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    return torch.stack([x - t, y * 0.8 - 0.2, x * y - 0.5])


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (1, 1), (17, 31)])
@pytest.mark.parametrize("fps", [8.0, 30000 / 1001])
def test_mp4_is_what_was_given(tmp_path: Path, size: tuple[int, int], fps: float, full_decode: Any) -> None:
    path = tmp_path / "video.mp4"
    video = smooth(9, *size)
    write_mp4(path, video, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        assert float(stream.average_rate or 0) == pytest.approx(fps, rel=1e-4)
        assert stream.width % 2 == stream.height % 2 == 0
    _, pictures, _ = full_decode(path)
    assert len(pictures) == 9
    got = torch.from_numpy(np.stack(pictures))[:, : size[0], : size[1]].permute(3, 0, 1, 2)
    difference = (got.float() - (video + 1) * 127.5).abs()
    assert difference.mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


def test_mp4_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, smooth(3, 16, 16), 8)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of ink")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
    with pytest.raises(RuntimeError, match="out of ink"):
        write_mp4(path, smooth(3, 16, 16), 8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(
    ("video", "fps", "words"),
    [
        (torch.zeros(4, 8, 16, 16), 8, r"\(4, 8, 16, 16\): expected \[3, T, H, W\]"),
        (torch.zeros(3, 0, 16, 16), 8, "at least one frame"),
        (torch.zeros(1, 3, 8, 16, 16), 8, "expected"),
        (torch.zeros(3, 2, 16, 16), 0, "fps 0"),
        (torch.zeros(3, 2, 16, 16), float("nan"), "fps nan"),
    ],
)
def test_mp4_of_nothing(tmp_path: Path, video: torch.Tensor, fps: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        write_mp4(tmp_path / "video.mp4", video, fps)
    assert not list(tmp_path.iterdir())


def test_values_outside_are_clamped(tmp_path: Path, full_decode: Any) -> None:
    write_mp4(tmp_path / "video.mp4", torch.full((3, 2, 16, 16), 7.0), 8)
    _, pictures, _ = full_decode(tmp_path / "video.mp4")
    assert pictures[0].min() >= 252


def columns_of(sheet: Image.Image, y: int) -> list[tuple[int, int]]:
    """(start, end) of what isn't paper along a line of the sheet."""
    line = (np.asarray(sheet)[y] != 255).any(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def test_contact_sheet_layout() -> None:
    """Evenly spaced frames, first and last included; small ones enlarged by a whole factor; captions take room."""
    video = torch.linspace(-1, 0.9, 9).reshape(1, 9, 1, 1).expand(3, 9, 32, 40)
    sheet = contact_sheet([video, video], ["one", "two"], columns=5)
    assert columns_of(sheet, 60) == [
        (4 + i * 124, 124 + i * 124) for i in range(5)
    ]  # 40 pixels, three times, gaps of 4
    shades = [int(np.asarray(sheet)[60, 64 + i * 124, 0]) for i in range(5)]
    wanted = [round((float(video[0, i, 0, 0]) + 1) * 127.5) for i in (0, 2, 4, 6, 8)]
    assert shades == wanted
    assert sheet.height > 2 * 96
    few = contact_sheet([video[:, :2]], ["short"], columns=5)
    assert len(columns_of(few, 60)) == 2
    sized = contact_sheet([video], ["x"], columns=2, size=200)
    assert [b - a for a, b in columns_of(sized, 100)] == [200, 200]
    large = contact_sheet([torch.zeros(3, 2, 128, 200)], ["x"], columns=2)
    assert [b - a for a, b in columns_of(large, 80)] == [200, 200]


def test_long_captions_are_wrapped() -> None:
    video = torch.zeros(3, 4, 64, 64)
    short = contact_sheet([video], ["a"], columns=4)
    long = contact_sheet([video], ["word " * 60 + "x" * 200], columns=4)
    assert long.width == short.width
    assert long.height > short.height + 5 * 16
    assert (np.asarray(long)[:, -2:] == 255).all()  # nothing runs over the edge


def test_details_are_drawn_below_each_caption() -> None:
    video = torch.zeros(3, 4, 64, 64)
    plain = contact_sheet([video, video], ["a", "b"], columns=4)
    told = contact_sheet([video, video], ["a", "b"], details=["seed 1, a.mp4", "seed 2, b.mp4"], columns=4)
    assert told.width == plain.width
    assert told.height == plain.height + 2 * (SMALL + 3)
    with pytest.raises(DataError, match="2 videos and 1 details"):
        contact_sheet([video, video], ["a", "b"], details=["seed 1"])


def test_single_pictures_are_a_grid() -> None:
    """Seven are three rows of three, each enlarged until a line of text fits below it."""
    pictures = [torch.full((3, 1, 64, 48), i / 10) for i in range(7)]
    sheet = contact_sheet(pictures, [f"number {i}" for i in range(7)])
    assert sheet.width == 3 * (144 + 2 * 4)  # three times their size, and gaps
    pixels = np.asarray(sheet)
    height = sheet.height // 3
    shades = [int(pixels[y * height + 100, x * 152 + 76, 0]) for y in range(3) for x in range(3)]
    assert shades == [*(round((i / 10 + 1) * 127.5) for i in range(7)), 255, 255]
    narrow = contact_sheet(pictures, ["a long caption of a picture"] * 7, details=["seed 0"] * 7, columns=2)
    assert narrow.width == 2 * 152
    assert contact_sheet(pictures[:1], ["one"]).width == 152
    mixed = contact_sheet([pictures[0], torch.zeros(3, 2, 64, 48)], ["one", "two"])
    assert mixed.width > mixed.height / 2  # a row each


def picture_of(letter: str) -> bytes:
    return draw_label(letter, 100).tobytes()


def test_accented_letters_are_drawn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As themselves, composed or not; they are no squares, and none is lost on the way."""
    monkeypatch.setattr(labels, "_installed_fonts", list)
    letters = "éèüñçåøłőșžßŒĞжЯλα"
    drawn = [picture_of(letter) for letter in letters]
    assert len(set(drawn)) == len(letters)
    assert picture_of(labels.MISSING) not in drawn
    assert picture_of("e") not in drawn
    assert picture_of("e\N{COMBINING ACUTE ACCENT}") == picture_of("é")
    assert missing_characters("Ein Mädchen läuft über die Straße, “naïve” — 20 €") == ""
    contact_sheet([torch.zeros(3, 1, 8, 8)], ["crème brûlée"])
    assert not caplog.records


def test_what_no_font_has_is_a_square_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(labels, "_installed_fonts", lambda: ["/no/such/font.ttf"])
    labels._font_file.cache_clear()
    try:
        assert missing_characters("a 红色 circle 红") == "红色"
        assert picture_of("红") == picture_of(labels.MISSING)
        contact_sheet([torch.zeros(3, 2, 8, 8)] * 2, ["a 红色 circle", "圆"], details=["seed 0", "红.mp4"])
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "no installed font has 红 (U+7EA2), 色 (U+8272), 圆 (U+5706): drawn as □" in record.message
    finally:
        labels._font_file.cache_clear()


def test_an_installed_font_is_taken_where_it_has_all_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """STIX, which is in matplotlib, has script letters of a text that DejaVu, likewise there, lacks."""
    stix = labels._dejavu().replace("DejaVuSans", "STIXGeneral")
    lacking = sorted(labels._characters(stix) - labels._characters(labels._dejavu()))
    letter = next(chr(code) for code in lacking if chr(code).isalpha())
    monkeypatch.setattr(labels, "_installed_fonts", lambda: [stix])
    labels._font_file.cache_clear()
    try:
        assert missing_characters(f"a {letter}") == ""
        assert picture_of(letter) != picture_of(labels.MISSING)
    finally:
        labels._font_file.cache_clear()


def test_videos_and_captions_must_match() -> None:
    for videos, captions in (([], []), ([torch.zeros(3, 1, 4, 4)], []), ([torch.zeros(3, 1, 4, 4)], ["a", "b"])):
        with pytest.raises(DataError, match="expected one caption per video"):
            contact_sheet(videos, captions)
    with pytest.raises(DataError, match="columns 0"):
        contact_sheet([torch.zeros(3, 1, 4, 4)], ["a"], columns=0)


def test_video_wall(tmp_path: Path, full_decode: Any) -> None:
    """Three videos, two in a row; the shorter ones hold their last frame."""
    videos = [torch.full((3, frames, 96, 96), value) for frames, value in ((2, -0.8), (6, 0.0), (4, 0.6))]
    videos[0][:, 1] = -0.2
    video_wall(tmp_path / "wall.mp4", videos, ["a", "b", "c"], fps=6, columns=2)
    _, pictures, _ = full_decode(tmp_path / "wall.mp4")
    assert len(pictures) == 6
    first, last = pictures[0], pictures[-1]
    cell = first.shape[1] // 2
    assert abs(int(first[60, 50, 0]) - 26) < 6
    assert abs(int(last[60, 50, 0]) - 102) < 6
    assert abs(int(last[60, cell + 50, 0]) - 128) < 6
    assert abs(int(last[first.shape[0] // 2 + 60, 50, 0]) - 204) < 6
    assert last[first.shape[0] // 2 + 60, cell + 50].min() > 245  # the empty place


class Shades:
    """Clips of one shade each; odd ones can't be read."""

    def __len__(self) -> int:
        return 10

    def bucket(self, index: int) -> Bucket:
        return Bucket(3, 16, 16)

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        if index % 2:
            raise ClipError(f"{index}.mp4", "odd")
        return Clip(torch.full((3, 3, 16, 16), index / 10), f"shade {index}", index, 8.0)


def test_preview(tmp_path: Path) -> None:
    errors = preview(Shades(), tmp_path / "a" / "sheet.png", tmp_path / "b" / "wall.mp4", samples=5, columns=3)
    assert {error.path for error in errors} <= {f"{i}.mp4" for i in range(1, 10, 2)}
    sheet = np.asarray(Image.open(tmp_path / "a" / "sheet.png"))
    shades = [row for row in sheet[:, 50, 0].tolist() if row != 255]
    assert sorted(set(shades) & {128, 153, 178, 204, 230}) == [
        128,
        153,
        178,
        204,
        230,
    ]  # in dataset order, all good ones
    with av.open(str(tmp_path / "b" / "wall.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        assert container.streams.video[0].frames == 3
    with pytest.raises(DataError, match="samples 0"):
        preview(Shades(), tmp_path / "x.png", samples=0)


def test_clips_of_several_rates_play_at_their_own_speed(tmp_path: Path) -> None:
    class Mixed(Shades):
        def __len__(self) -> int:
            return 2

        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            video = torch.linspace(-0.9, 0.9, 4)[None, :, None, None].expand(3, 4, 96, 96)
            return Clip(video, f"clip {index}", index, (3.0, 12.0)[index])

    preview(Mixed(), tmp_path / "sheet.png", tmp_path / "wall.mp4", samples=2)
    with av.open(str(tmp_path / "wall.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    width = frames[0].shape[1]
    slow, fast = ([int(frame[70, x, 0]) for frame in frames] for x in (width // 4, 3 * width // 4))
    levels = [round((v + 1) * 127.5) for v in (-0.9, -0.3, 0.3, 0.9)]
    assert slow == pytest.approx([level for level in levels for _ in range(4)], abs=6)
    assert fast == pytest.approx(levels + levels[-1:] * 12, abs=6)


def test_preview_of_nothing_readable(tmp_path: Path) -> None:
    class Bad(Shades):
        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            raise ClipError(f"{index}.mp4", "gone")

    with pytest.raises(DataError, match=r"no clip can be read; the first: \d.mp4: gone"):
        preview(Bad(), tmp_path / "x.png")
