"""Scores tell a fault from none, for every fault that they are for."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit_data.curation.engine import run
from stdit_data.curation.sampling import ClipFrames, frames_at, read_clip
from stdit_data.curation.score import SCORERS, ScoreStep
from stdit_data.curation.scorers import blockiness, camera, exposure, fingerprint, letterbox, motion, sharpness
from stdit_data.curation.tables import open_rows
from stdit_data.errors import ClipError, DataError
from stdit_data.video.segments import Segment
from stdit_data.workers.executors import Inline

from .conftest import moving, texture


def clip_of(pictures: list[np.ndarray]) -> ClipFrames:
    height, width = pictures[0].shape[:2]
    full = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures[:3]]
    times = [number / 2 for number in range(len(pictures))]
    return ClipFrames(np.stack(pictures), times, full, width, height, 24.0, times[-1] + 0.5, len(pictures))


@pytest.fixture(scope="module")
def scores(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("scores") / "score.parquet"
    run(ScoreStep(), open_rows(str(raw)), str(out), Inline())
    return {Path(row["path"]).name: row for row in pq.read_table(out).to_pylist()}


def test_no_row_is_dropped_but_the_unreadable_one(scores: dict[str, dict]) -> None:
    videos = {f"{name}.mp4" for name in ("scenes", "good", "copy", "reencoded", "still", "blurred", "letterboxed")}
    assert set(scores) == {*videos, "photo.png"}


def test_faults_stand_out(scores: dict[str, dict]) -> None:
    good = scores["good.mp4"]
    assert (good["duration"], good["fps"], good["short_side"]) == (3.0, 24.0, 96)
    assert scores["still.mp4"]["frozen_share"] >= 0.8  # a key frame alone changes a picture a little
    assert scores["still.mp4"]["motion"] < 0.05
    assert good["frozen_share"] == 0.0
    assert good["motion"] > 3
    assert scores["blurred.mp4"]["sharpness"] < good["sharpness"] / 5
    assert scores["letterboxed.mp4"]["letterbox"] == pytest.approx(1 / 3, abs=0.03)
    assert good["letterbox"] == 0.0
    assert scores["scenes.mp4"]["black_share"] == pytest.approx(0.5 / 19.5, abs=0.03)


def test_an_image_has_no_motion(scores: dict[str, dict]) -> None:
    photo = scores["photo.png"]
    assert (photo["duration"], photo["num_frames"]) == (0.0, 1)
    assert photo["fps"] is photo["motion"] is photo["pan_x"] is photo["flicker"] is None
    assert photo["sharpness"] > 10


def test_every_column_has_its_type(scores: dict[str, dict]) -> None:
    for scorer in SCORERS:
        assert set(scorer.score(clip_of(moving(1, 0.25)))) == set(scorer.COLUMNS)


def test_sharpness_falls_with_blur() -> None:
    picture = texture(1)
    values = [
        sharpness.score(clip_of([cv2.GaussianBlur(picture, (0, 0), blur) if blur else picture]))["sharpness"]
        for blur in (0, 1, 3)
    ]
    assert values == sorted(values, reverse=True)


def test_blockiness_grows_with_blocks() -> None:
    picture = texture(1)
    blocks = cv2.resize(
        cv2.resize(picture, (20, 12), interpolation=cv2.INTER_AREA), (160, 96), interpolation=cv2.INTER_NEAREST
    )
    mixed = cv2.addWeighted(picture, 0.5, blocks, 0.5, 0)
    assert blockiness.score(clip_of([picture]))["blockiness"] == pytest.approx(1, abs=0.1)
    assert blockiness.score(clip_of([mixed]))["blockiness"] > 1.3  # type: ignore[operator]
    assert blockiness.score(clip_of([np.full((96, 160, 3), 80, np.uint8)]))["blockiness"] == 1.0


def test_flicker_is_not_a_fade() -> None:
    picture = texture(2)
    fade = [(picture * share).astype(np.uint8) for share in np.linspace(0.2, 1, 8)]
    flash = [(picture * share).astype(np.uint8) for share in (1, 0.5) * 4]
    assert exposure.score(clip_of(fade))["flicker"] < 0.01  # type: ignore[operator]
    assert exposure.score(clip_of(flash))["flicker"] > 0.1  # type: ignore[operator]


def test_a_dark_scene_is_neither_black_nor_barred() -> None:
    night = (texture(3) * 0.2).astype(np.uint8)
    clip = clip_of([night] * 3)
    assert exposure.score(clip)["black_share"] == 0.0
    assert letterbox.score(clip)["letterbox"] == 0.0


def test_the_picture_box_is_within_the_bars() -> None:
    picture = texture(4)
    picture[:, :40] = 0
    score = letterbox.score(clip_of([picture] * 2))
    assert score["picture_box"] == [0.25, 0.0, 1.0, 1.0]


def test_a_pan_to_the_right_and_a_zoom() -> None:
    wide = texture(5, 400, 200)
    pan = [wide[50:146, 4 * number : 4 * number + 160] for number in range(6)]
    found = camera.score(clip_of(pan))
    assert found["pan_x"] == pytest.approx(4, abs=0.3)
    assert found["pan_y"] == pytest.approx(0, abs=0.2)
    closer = []
    for number in range(5):
        width, height = round(160 / 1.02**number), round(96 / 1.02**number)
        left, top = (400 - width) // 2, (200 - height) // 2
        closer.append(cv2.resize(wide[top : top + height, left : left + width], (160, 96)))
    assert camera.score(clip_of(closer))["zoom"] == pytest.approx(0.02, abs=0.006)


def test_motion_names_its_weakest_pair() -> None:
    pictures = moving(6, 0.25, speed=3)
    found = motion.score(clip_of([*pictures, pictures[-1]]))
    assert found["motion_min"] < 0.1 < found["motion"]  # type: ignore[operator]


def test_hashes_are_near_for_one_picture_and_far_for_others() -> None:
    def bits(one: bytes, other: bytes) -> int:
        return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()

    first, second = (cv2.cvtColor(texture(seed), cv2.COLOR_RGB2GRAY) for seed in (1, 2))
    small = cv2.resize(cv2.resize(first, (107, 64)), (160, 96))
    assert bits(fingerprint.perceptual_hash(first), fingerprint.perceptual_hash(small)) < 16
    assert bits(fingerprint.perceptual_hash(first), fingerprint.perceptual_hash(second)) > 80


def test_frames_are_those_on_screen(raw: Path) -> None:
    clip = read_clip(str(raw / "scenes.mp4"), Segment(3.0, 6.1), fps=2)
    assert clip.times == pytest.approx([3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0])
    assert clip.rgb.shape == (7, 96, 160, 3)
    assert clip.seconds == pytest.approx(3.1)
    assert len(clip.full) == 3
    first, middle, last = frames_at(str(raw / "scenes.mp4"), Segment(3.0, 6.0), (0.2, 0.5, 0.8), size=80)
    assert first.shape == (48, 80, 3)
    later = read_clip(str(raw / "scenes.mp4"), Segment(4.5), size=80).rgb[0]
    assert np.abs(middle.astype(int) - later).max() == 0
    assert np.abs(first.astype(int) - last).mean() > 5


def test_a_segment_beyond_the_end(raw: Path) -> None:
    with pytest.raises(ClipError, match="no frames in the cut"):
        read_clip(str(raw / "good.mp4"), Segment(50.0, 60.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"fps": 0.0}, "rate above 0"), ({"size": 8}, "32 pixels"), ({"aesthetic": "head.pth"}, "`clip=MODEL`")],
)
def test_wrong_settings(settings: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ScoreStep(**settings)


def test_clip_and_aesthetic_scores(raw: Path, tmp_path: Path) -> None:
    import torch

    pytest.importorskip("transformers", reason="an extra of stdit-data")

    make_clip(tmp_path / "clip")
    first = {"layers.0.weight": torch.ones(4, 16) / 4, "layers.0.bias": torch.ones(4)}
    second = {"layers.2.weight": torch.ones(1, 4), "layers.2.bias": torch.zeros(1)}
    torch.save(first | second, tmp_path / "head.pth")
    source = tmp_path / "in.csv"
    source.write_text(f"path,caption\n{raw}/good.mp4,a good clip\n{raw}/still.mp4,\n")
    step = ScoreStep(clip=str(tmp_path / "clip"), aesthetic=str(tmp_path / "head.pth"))
    run(step, open_rows(str(source)), str(tmp_path / "out.parquet"), Inline())
    good, still = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert -1 <= good["clip_score"] <= 1
    assert still["clip_score"] is None
    assert good["aesthetic_min"] <= good["aesthetic"] == pytest.approx(4, abs=4)
    with pytest.raises(DataError, match="expected from 16 numbers"):
        torch.save({"layers.0.weight": torch.ones(1, 9), "layers.0.bias": torch.ones(1)}, tmp_path / "head.pth")
        step.open()
    with pytest.raises(DataError, match="no CLIP model"):
        ScoreStep(clip=str(tmp_path / "none")).open()


def make_clip(folder: Path) -> None:
    """A tiny random CLIP model with a tokenizer of single letters."""
    import json

    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def test_schema_types() -> None:
    schema = ScoreStep(text=True, clip="x", aesthetic="y").schema(pa.schema([("path", pa.string())]))
    assert schema.field("text_area").type == schema.field("aesthetic").type == pa.float64()
