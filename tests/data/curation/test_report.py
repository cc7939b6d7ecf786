"""The page of a filter: one file, its numbers, thresholds and the clips nearest to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit_data.curation.filtering.report import write_report
from stdit_data.curation.tables import open_rows


class Page(HTMLParser):
    """Collects the text of the tags of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.lines = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.lines += tag == "line"
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def scored(tmp_path: Path, encode_clip: Callable[..., Path]) -> str:
    """Six rows of one clip with motion 0 to 4 and one without, and names that are no HTML."""
    encode_clip(tmp_path / "a<b>&'c.mp4", frames=6)
    rows = {
        "path": [str(tmp_path / "a<b>&'c.mp4")] * 5 + [str(tmp_path / "lost.mp4")],
        "caption": ["<script>alert(1)</script>"] * 6,
        "start_frame": [0, 1, 2, 3, 4, 0],
        "motion": pa.array([0.0, 1.0, 2.0, 3.0, None, 4.0], pa.float64()),
        "codec": ["h264"] * 6,
    }
    pq.write_table(pa.table(rows), tmp_path / "scored.parquet")
    return str(tmp_path / "scored.parquet")


def test_counts_thresholds_and_the_nearest_clips(scored: str, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_report(
        str(tmp_path / "new" / "page.html"),
        open_rows(scored),
        "motion > 1.5 and codec == 'h264'",
        clips=1,
        workers=1,
        progress=lambda *now: calls.append(now),
    )
    text = (tmp_path / "new" / "page.html").read_text()
    page = Page(text)
    together = " ".join(" ".join(page.texts).split())
    assert "scored.parquet: 3 of 6 clips kept" in together
    assert "motion > 1.5 3 3" in together  # passes, fails: the row without motion fails
    assert "50.0%" in together
    assert page.lines >= 1  # the threshold in the histogram
    assert ", 1 without" in together
    # The nearest on each side: 2 passes and 1 fails.
    rule = text[text.index("<h2 id=rule0>") : text.index("<h2 id=rule1>")]
    assert "<b>2</b>" in rule
    assert "<b>1</b>" in rule
    assert "<b>3</b>" not in rule
    assert calls[-1] == (len(calls), len(calls))
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)  # one file
    assert "alert(1)" in together
    assert "<script" not in text
    assert any("a<b>&'c.mp4" in title for title in page.titles)


def test_a_clip_that_cannot_be_read_is_shown_as_such(scored: str, tmp_path: Path) -> None:
    write_report(str(tmp_path / "page.html"), open_rows(scored), "motion >= 4", clips=8, workers=1)
    page = Page((tmp_path / "page.html").read_text())
    assert page.texts.count("not readable") == 1
    assert sum(link.startswith("data:image/jpeg") for link in page.links) == 5


def test_a_column_of_one_value_and_one_of_none(tmp_path: Path) -> None:
    rows = {"path": ["/none/a.mp4"] * 2, "same": [3.0, 3.0], "none": pa.array([None, None], pa.float64())}
    pq.write_table(pa.table(rows), tmp_path / "scored.parquet")
    write_report(str(tmp_path / "page.html"), open_rows(str(tmp_path / "scored.parquet")), "same > 1 and none is None")
    assert "2 of 2 clips kept" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize(("keep", "outlier", "beyond"), [("motion >= 5", 2.0, 0), ("motion <= 500", 900.0, -1)])
def test_a_bar_is_on_its_side_of_the_threshold(
    tmp_path: Path, count: int, keep: str, outlier: float, beyond: int
) -> None:
    values = [outlier, *(100.0 + 300 * i / count for i in range(count))]
    pq.write_table(pa.table({"path": ["/none.mp4"] * len(values), "motion": values}), tmp_path / "scored.parquet")
    rows = open_rows(str(tmp_path / "scored.parquet"))
    write_report(str(tmp_path / "page.html"), rows, keep, clips=1, workers=1)
    text = (tmp_path / "page.html").read_text()
    svg = text[text.index("<svg") : text.index("</svg>")]
    line = float(re.findall(r"<line x1='([\d.]+)'", svg)[0])
    bars = re.findall(r"<rect x='([\d.]+)' .*?width='([\d.]+)'", svg)
    sides = [float(x) + float(width) < line for x, width in bars]
    assert all(left or float(x) >= line for left, (x, _) in zip(sides, bars, strict=True))
    assert sides.count(beyond == 0) == 1
    assert sides[beyond] == (beyond == 0)
