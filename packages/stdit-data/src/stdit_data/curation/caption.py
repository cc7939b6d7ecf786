"""Write captions of clips and images, by a model on this machine or a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data.curation.captioners.answers import to_caption
from stdit_data.curation.captioners.prompts import Captioner, Question, ask
from stdit_data.curation.engine import Reject, Result
from stdit_data.curation.sampling import frames_at
from stdit_data.curation.tables import from_dicts, segment_of, to_dicts, with_columns
from stdit_data.errors import ClipError, DataError
from stdit_data.storage import files, readers

SHARES = (0.2, 0.5, 0.8)  # of the clip's length, at which its frames are taken
COLUMNS = {
    "caption": pa.string(),
    "caption_flag": pa.string(),  # of a written caption that is not good: one of `answers.FLAGS`
}


@dataclass(frozen=True)
class CaptionStep:
    """Describes the clips that have no caption yet, or one with a flag, from three frames.

    Args:
        model: folder or Hub id of a captioner, or the name of a server's model.
        server: URL of a server with OpenAI's API, in place of a model on this machine.
        prompt: in place of the built-in ones for videos and images; "{count}" stands for the number of images.
        temperature: of sampling.
        max_tokens: of an answer.
        size: longer side of the frames in pixels.
        seed: of all answers; every clip has its own, derived from it.
        overwrite: also describe clips that have a caption.
        batch: clips at a time: of the model, or requests to the server.
        threads: clips decoded at a time.
        shard_rows: rows a shard.
        gpus: of a worker of a Ray cluster.
    """

    model: str | None = None
    server: str | None = None
    prompt: str | None = None
    temperature: float = 0.2
    max_tokens: int = 320
    size: int = 768
    seed: int = 0
    overwrite: bool = False
    batch: int = 8
    threads: int = 1
    shard_rows: int = 64
    gpus: float = 0.0

    name = "caption"

    def __post_init__(self) -> None:
        if self.model is None and self.server is None:
            raise DataError("no captioner: give `model=PATH`, a Hub id, or `server=URL`")
        if self.temperature < 0 or self.max_tokens < 1 or self.size < 32 or self.batch < 1:
            raise DataError(
                f"temperature {self.temperature:g}, max-tokens {self.max_tokens}, size {self.size}, batch {self.batch}"
                ": expected a temperature from 0, at least 1 token, 32 pixels and 1 clip"
            )

    @property
    def has_model(self) -> bool:
        return self.server is None

    def settings(self) -> dict[str, Any]:
        # Not batch and server: a run goes on with a smaller batch, or when the server has moved.
        return {
            "model": self.model,
            "prompt": self.prompt,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "size": self.size,
            "seed": self.seed,
            "overwrite": self.overwrite,
        }

    def schema(self, given: pa.Schema) -> pa.Schema:
        return with_columns(given, COLUMNS)

    def open(self) -> Captioner:
        options: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.model is None:
            raise DataError("the server's model is not known; see `checked`")
        if self.server is not None:
            from stdit_data.curation.captioners.server import ServerCaptioner

            return ServerCaptioner(self.server, self.model, **options, batch=self.batch)
        from stdit_data.curation.captioners.local import LocalCaptioner

        return LocalCaptioner(self.model, **options)

    def run(self, shard: pa.Table, opened: Captioner) -> Result:
        rows = to_dicts(shard)
        wanted = [number for number, row in enumerate(rows) if self.wants(row)]
        values: dict[int, dict[str, Any]] = {}
        rejects: dict[int, Reject] = {}

        def question(number: int) -> Question | str:
            row = rows[number]
            segment = segment_of(row)
            try:
                images = frames_at(row["path"], segment, SHARES, size=self.size)
            except ClipError as error:
                return error.reason
            return ask(images, row["path"], segment, self.seed, self.prompt)

        def refuse(number: int, reason: str) -> None:
            place = {name: rows[number].get(name) for name in ("path", "start", "end")}
            rejects[number] = {**place, "step": self.name, "reason": reason}

        with readers.threads(self.threads) as pool:  # decodes ahead while the model writes
            pending = zip(wanted, pool.map(question, wanted), strict=True)
            while group := list(islice(pending, self.batch)):
                asked = {number: item for number, item in group if isinstance(item, Question)}
                for number, item in group:
                    if isinstance(item, str):
                        refuse(number, item)
                answers = opened(list(asked.values())) if asked else []
                for number, answer in zip(asked, answers, strict=True):
                    if answer.failure:
                        refuse(number, answer.failure)
                    else:
                        values[number] = dict(zip(COLUMNS, to_caption(answer), strict=True))
        kept = [row | values.get(number, {}) for number, row in enumerate(rows) if number not in rejects]
        return Result(from_dicts(kept, self.schema(shard.schema)), [rejects[number] for number in sorted(rejects)])

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row is to be described: without a caption, or with one that was flagged."""
        return self.overwrite or not (row.get("caption") or "").strip() or row.get("caption_flag") is not None


def checked(step: CaptionStep) -> CaptionStep:
    """Check the captioner before anything runs, and find the name of a server's model.

    Raises:
        DataError: not a captioner, or no such server.
    """
    if step.server is not None:
        from stdit_data.curation.captioners.server import find_model

        return replace(step, model=find_model(step.server, step.model))
    from stdit_data.curation.captioners.local import load_processor

    load_processor(str(step.model))
    return step


def flagged(out: str) -> Iterator[dict[str, Any]]:
    """Yield path, start, end, caption and caption_flag of the rows of a manifest whose captions are flagged."""
    with files.open_binary(out) as file:
        parquet = pq.ParquetFile(file)
        names = [name for name in ("path", "start", "end", *COLUMNS) if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=names):
            table = pa.Table.from_batches([batch])
            yield from to_dicts(table.filter(table["caption_flag"].is_valid()))
