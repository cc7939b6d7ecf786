"""Score clips: one decode feeds every scorer, each writes its columns, and no row is dropped for its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import pyarrow as pa

from stdit_data.curation.engine import Result
from stdit_data.curation.sampling import ClipFrames, read_clip
from stdit_data.curation.scorers import (
    blockiness,
    camera,
    exposure,
    facts,
    fingerprint,
    letterbox,
    motion,
    sharpness,
)
from stdit_data.curation.tables import from_dicts, segment_of, to_dicts, with_columns
from stdit_data.errors import ClipError, DataError
from stdit_data.storage import readers

SCORERS = (facts, sharpness, blockiness, exposure, letterbox, motion, camera, fingerprint)
TEXT_COLUMNS = {"text_area": pa.float64()}  # share of the picture, mean of the frames looked at
CLIP_COLUMNS = {"clip_score": pa.float64()}  # cosine of caption and picture, mean of the frames; None without caption
AESTHETIC_COLUMNS = {
    "aesthetic": pa.float64(),  # 1 to 10, mean of the frames
    "aesthetic_min": pa.float64(),  # of the worst frame
}
Scorer = Callable[[ClipFrames], dict[str, Any]]


@dataclass(frozen=True)
class ScoreStep:
    """Measures every clip.

    Args:
        fps: frames a second that are looked at.
        size: their longer side in pixels.
        text: also the area that text covers (RapidOCR).
        clip: folder or Hub id of a CLIP model: also how well captions fit.
        aesthetic: weights of an aesthetic head for that model: also how well the picture pleases.
        threads: clips decoded at a time.
        shard_rows: rows a shard.
    """

    fps: float = 2.0
    size: int = 256
    text: bool = False
    clip: str | None = None
    aesthetic: str | None = None
    threads: int = 1
    shard_rows: int = 64
    gpus: float = 0.0

    name = "score"

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000 or self.size < 32:
            raise DataError(f"fps {self.fps:g}, size {self.size}: expected a rate above 0 and at least 32 pixels")
        if self.aesthetic and not self.clip:
            raise DataError("an aesthetic head works on the embedding of a CLIP model: give `clip=MODEL` too")

    @property
    def has_model(self) -> bool:
        return self.text or self.clip is not None

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Return all columns that this step sets."""
        found: dict[str, pa.DataType] = {}
        for scorer in SCORERS:
            found |= scorer.COLUMNS
        found |= TEXT_COLUMNS if self.text else {}
        found |= CLIP_COLUMNS if self.clip else {}
        return found | (AESTHETIC_COLUMNS if self.aesthetic else {})

    def settings(self) -> dict[str, Any]:
        return {
            "fps": self.fps,
            "size": self.size,
            "text": self.text,
            "clip": self.clip,
            "aesthetic": self.aesthetic,
        }

    def schema(self, given: pa.Schema) -> pa.Schema:
        return with_columns(given, self.columns)

    def open(self) -> list[Scorer]:
        models: list[Scorer] = []
        if self.text:
            from stdit_data.curation.scorers.text import TextArea

            models.append(TextArea())
        if self.clip:
            from stdit_data.curation.scorers.clip import ClipScores

            models.append(ClipScores(self.clip, self.aesthetic))
        return models

    def run(self, shard: pa.Table, opened: list[Scorer]) -> Result:
        one_at_a_time = Lock()  # models are not made for several threads

        def score(row: dict[str, Any]) -> dict[str, Any]:
            try:
                clip = read_clip(row["path"], segment_of(row), fps=self.fps, size=self.size)
            except ClipError as error:
                return {"reject": error.reason}
            clip = replace(clip, caption=row.get("caption") or "")
            values: dict[str, Any] = {}
            for scorer in SCORERS:
                values |= scorer.score(clip)
            with one_at_a_time:
                for model in opened:
                    values |= model(clip)
            return values

        rows = to_dicts(shard)
        with readers.threads(self.threads) as pool:
            scores = list(pool.map(score, rows))
        kept = [row | values for row, values in zip(rows, scores, strict=True) if "reject" not in values]
        rejects = [
            {"path": row["path"], "start": row.get("start"), "end": row.get("end"), "step": self.name}
            | {"reason": values["reject"]}
            for row, values in zip(rows, scores, strict=True)
            if "reject" in values
        ]
        return Result(from_dicts(kept, self.schema(shard.schema)), rejects)
