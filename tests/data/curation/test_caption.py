"""Captions from a captioner's answers, and the step around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stdit_data.curation.caption import CaptionStep
from stdit_data.curation.captioners.answers import strip_openers, to_caption
from stdit_data.curation.captioners.prompts import Answer, Captioner, Question, ask
from stdit_data.curation.engine import rejects_path, run
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.video.segments import Segment
from stdit_data.workers.executors import Inline


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("The video shows a man walking.", "A man walking."),
        ("This short video clip depicts two dogs.", "Two dogs."),
        ("The three images show a red car.", "A red car."),
        ("In this video, we can see snow.", "Snow."),
        ("In the scene, a cat sleeps.", "A cat sleeps."),
        ("The image is a painting of a lake.", "A painting of a lake."),
        ("The image is of a lake.", "A lake."),
        ("Sure! Here is a description of the video:\n\nThe video appears to show a  lake.", "A lake."),
        ('"Caption: A lake at night."', "A lake at night."),
        ("The frames showcase a kite.", "A kite."),
        ("The video game shows its menu.", "The video game shows its menu."),
        ("The videographer films a lake.", "The videographer films a lake."),
        ("The scene is dark.", "The scene is dark."),
        ("A man shows the video of a lake.", "A man shows the video of a lake."),
    ],
)
def test_openers_are_stripped(text: str, caption: str) -> None:
    assert strip_openers(text) == caption


@pytest.mark.parametrize(
    ("text", "finished", "flag"),
    [
        ("A man walks his dog.", True, None),
        ("A man walks very, very, very slowly. The man is old. The dog is old.", True, None),
        ("\n", True, "empty"),
        ("The video shows", True, None),  # not an opener without what it opens
        ("...", True, "empty"),
        ("A man walks his dog along the", False, "cut off"),
        ("A dog. " * 5, True, "repeated"),
        ("A man walks and then walks and then walks and then walks and then walks", False, "repeated"),
        ("The tree, the tree, the tree, the tree, the tree", True, "repeated"),
        ("一只猫在睡觉一只猫在睡觉一只猫在睡觉一只猫在睡觉", True, "repeated"),
        ("一只橘色的猫在窗边的沙发上睡觉, 阳光照在它身上", True, None),
        ("I'm sorry, but I can't help with that.", True, "refused"),
        ("I can’t view videos.", True, "refused"),
        ("Unfortunately, I am unable to see the images.", True, "refused"),
        ("As an AI language model, I see nothing.", True, "refused"),
        ("Please provide the video.", True, "refused"),
        ("A sorry sight: I cannot count the birds.", True, None),
    ],
)
def test_answers_that_are_no_captions_are_flagged(text: str, finished: bool, flag: str | None) -> None:
    caption, found = to_caption(Answer(text, finished))
    assert found == flag
    assert (caption is None) == (flag == "empty")


def test_a_question_is_the_clips_own() -> None:
    first, moved, later, other = (
        ask([], path, Segment(start), seed, None).seed
        for path, start, seed in (("/a/x.mp4", 1, 0), ("/b/x.mp4", 1, 0), ("/a/x.mp4", 2, 0), ("/a/x.mp4", 1, 1))
    )
    assert first == moved
    assert len({first, later, other}) == 3
    image: Any = object()
    assert ask([image], "x", Segment(), 0, None).prompt.startswith("Describe this image")
    assert ask([image] * 3, "x", Segment(), 0, "{count} pictures: {what}?").prompt == "3 pictures: {what}?"


@dataclass(frozen=True)
class Told(CaptionStep):
    """Describes clips by the size of their frames."""

    groups: list[int] = field(default_factory=list)

    def open(self) -> Captioner:
        def answer(questions: Sequence[Question]) -> list[Answer]:
            self.groups.append(len(questions))
            return [Answer(f"{len(one.images)} pictures {one.images[0].shape}") for one in questions]

        return answer


def test_clips_without_a_caption_are_described_in_batches(raw: Path, tmp_path: Path) -> None:
    names = ["good.mp4", "broken.mp4", "still.mp4", "photo.png", "copy.mp4"]
    captions = ["", "", "kept", "", "  "]
    lines = [f"{raw / name},{caption},{name}" for name, caption in zip(names, captions, strict=True)]
    (tmp_path / "in.csv").write_text("\n".join(["path,caption,mine", *lines]))
    step = Told(model="told", batch=2, size=40, threads=2)
    out = str(tmp_path / "out.parquet")
    run(step, open_rows(str(tmp_path / "in.csv")), out, Inline())
    rows = pq.read_table(out).to_pylist()
    video = "3 pictures (24, 40, 3)"
    assert [row["caption"] for row in rows] == [video, "kept", "1 pictures (24, 40, 3)", video]
    assert [row["mine"] for row in rows] == ["good.mp4", "still.mp4", "photo.png", "copy.mp4"]
    assert step.groups == [1, 2]
    assert "broken.mp4" in Path(rejects_path(out)).read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "`model=PATH`"),
        ({"model": "x", "temperature": -1}, "temperature -1"),
        ({"model": "x", "batch": 0}, "batch 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        CaptionStep(**settings)


def test_the_pipeline_is_listed_in_its_order() -> None:
    pytest.importorskip("stdit_cli", reason="the command line is another package")
    from typer.testing import CliRunner

    from stdit_cli.main import app

    lines = CliRunner().invoke(app, ["data", "--help"]).output.splitlines()
    listed = [line.split()[1] for line in lines if len(line.split()) > 3 and line.split()[0] in "│|"]
    pipeline = ["cut", "score", "filter", "dedup", "caption", "curate", "validate", "preview", "encode", "inspect"]
    assert [name for name in listed if name in pipeline] == pipeline
