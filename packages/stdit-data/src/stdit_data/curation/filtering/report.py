"""Write an HTML page about a filter: a histogram of every column, and the clips on either side of each threshold."""

from __future__ import annotations

import base64
import heapq
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from stdit_data.curation.filtering.expression import Condition, Rule, column_values
from stdit_data.curation.sampling import frames_at
from stdit_data.curation.tables import Rows, segment_of, to_dicts
from stdit_data.errors import ClipError
from stdit_data.storage import atomic, readers

BINS = 48
SAMPLE = 2000  # values of a shard that a histogram's range is taken from
TAILS = (0.5, 99.5)  # per cent; what lies outside goes into the outermost bins
STRIP = (0.2, 0.5, 0.8)  # frames of a clip that are shown, as shares of its length
THUMBNAIL = 144  # pixels
SHARD = 65536  # rows
SHOWN_COLUMNS = ("path", "start", "end", "start_frame", "end_frame", "caption")
Progress = Callable[[int, int], None]


@dataclass
class _Column:
    """A column's histogram while it is being counted."""

    edges: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    missing: int = 0


@dataclass
class _Wall:
    """The clips nearest to a threshold, of those that pass the rule and of those that fail it."""

    rule: Rule
    passing: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    failing: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    passed: int = 0
    failed: int = 0


def write_report(
    out: str, rows: Rows, keep: str, *, clips: int = 8, workers: int = 4, progress: Progress = lambda done, total: None
) -> None:
    """Write the page, which is self-contained.

    Args:
        out: the page, .html.
        rows: the manifest before the filter.
        keep: the condition, its quantiles resolved.
        clips: how many on each side of a threshold.
        workers: clips decoded at a time.
        progress: called with the clips decoded, and how many there are to show.
    """
    condition = Condition(keep)
    columns = _ranges(rows, [rule for rule in condition.rules if rule.limit is not None])
    walls = [_Wall(rule) for rule in condition.rules]
    kept = _count(rows, condition, columns, walls, clips)
    shown = [row for wall in walls for side in (wall.passing, wall.failing) for _, _, row in side]
    strips: dict[str, str] = {}
    with readers.threads(workers) as pool:
        unique = {_key(row): row for row in shown}
        for done, (key, strip) in enumerate(zip(unique, pool.map(_strip, unique.values()), strict=True), 1):
            strips[key] = strip
            progress(done, len(unique))
    with atomic.open_write(out) as file:
        file.write(_page(rows, condition, kept, columns, walls, strips).encode(errors="backslashreplace"))


def _ranges(rows: Rows, rules: Sequence[Rule]) -> dict[str, _Column]:
    """Make empty histograms of the numeric columns; their ranges hold most values and all thresholds."""
    names = [
        field.name
        for field in rows.schema
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)
    ]
    samples: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    for table in rows.shards(SHARD):
        for name in names:
            values = column_values(table, name)
            samples[name].append(values[np.isfinite(values)][:: max(1, len(values) // SAMPLE)])
    found = {}
    for name in names:
        values = np.concatenate(samples[name])
        if len(values) == 0:
            continue
        limits = [rule.limit for rule in rules if rule.column == name and rule.limit is not None]
        low = min([np.percentile(values, TAILS[0], method="lower"), *limits])
        high = max([np.percentile(values, TAILS[1], method="higher"), *limits])
        spare = (high - low) / BINS  # a bin on the far side of a threshold at either end
        low, high = low - spare * (low in limits), high + spare * (high in limits)
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, BINS + 1)
        for limit in limits:  # no bar is on both sides of a threshold
            edges[1 + np.argmin(np.abs(edges[1:-1] - limit))] = limit
        found[name] = _Column(edges, np.zeros(BINS, np.int64))
    return found


def _count(rows: Rows, condition: Condition, columns: dict[str, _Column], walls: list[_Wall], clips: int) -> int:
    """Fill histograms and walls; return how many rows fulfil all rules."""
    kept = number = 0
    wanted = [name for name in SHOWN_COLUMNS if name in rows.schema.names]
    for table in rows.shards(SHARD):
        for name, column in columns.items():
            values = column_values(table, name)
            known = values[np.isfinite(values)]
            column.missing += len(values) - len(known)
            column.counts += np.histogram(np.clip(known, column.edges[0], column.edges[-1]), column.edges)[0]
        masks = condition.masks(table)
        kept += int(np.logical_and.reduce(masks).sum())
        for wall, mask in zip(walls, masks, strict=True):
            wall.passed += int(mask.sum())
            wall.failed += int((~mask).sum())
            rule = wall.rule
            if rule.limit is None or rule.column is None:
                distance, values = np.zeros(len(table)), np.full(len(table), np.nan)
            else:
                values = column_values(table, rule.column)
                distance = np.nan_to_num(np.abs(values - rule.limit), nan=np.inf)
            for side, holds in ((wall.passing, mask), (wall.failing, ~mask)):
                places = np.flatnonzero(holds)
                for place in places[np.argsort(distance[places], kind="stable")[:clips]].tolist():
                    row = to_dicts(table.select(wanted).slice(place, 1))[0] | {"value": float(values[place])}
                    side.append((float(distance[place]), number + place, row))
                side[:] = heapq.nsmallest(clips, side, key=lambda one: one[:2])
        number += len(table)
    return kept


def _key(row: dict[str, Any]) -> str:
    return f"{row['path']} {segment_of(row)}"


def _strip(row: dict[str, Any]) -> str:
    """Three frames of a clip side by side, as a JPEG in a data URL; empty where it can't be read."""
    try:
        pictures = frames_at(row["path"], segment_of(row), STRIP, size=THUMBNAIL)
    except ClipError:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, axis=1)).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(
    rows: Rows, condition: Condition, kept: int, columns: dict[str, _Column], walls: list[_Wall], strips: dict[str, str]
) -> str:
    title = f"{rows.url}: {kept} of {rows.count} clips kept"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p><code>{html.escape(condition.text)}</code></p>",
        "<table><tr><th>rule<th>pass<th>fail<th></tr>",
    ]
    for number, wall in enumerate(walls):
        share = wall.failed / max(1, rows.count)
        parts.append(
            f"<tr><td><a href='#rule{number}'><code>{html.escape(wall.rule.text)}</code></a><td>{wall.passed}"
            f"<td>{wall.failed}<td><span class=bar style='width:{100 * share:.1f}px'></span> {share:.1%}</tr>"
        )
    parts.append("</table>")
    for number, wall in enumerate(walls):
        parts.append(f"<h2 id=rule{number}><code>{html.escape(wall.rule.text)}</code></h2>")
        if wall.rule.column in columns:
            parts.append(_histogram(wall.rule.column or "", columns, [wall.rule]))
        for name, side in (("fail", wall.failing), ("pass", wall.passing)):
            nearest = ", nearest first" if wall.rule.limit is not None else ""
            parts.append(f"<h3>{name}{nearest}</h3><div class='wall {name}'>")
            parts += [_figure(row, strips) for _, _, row in side] or ["none"]
            parts.append("</div>")
    parts.append("<h2>All columns</h2><div class=columns>")
    parts += [_histogram(name, columns, condition.rules) for name in columns]
    parts.append("</div></html>")
    return "\n".join(parts)


def _figure(row: dict[str, Any], strips: dict[str, str]) -> str:
    value = "" if np.isnan(row["value"]) else f"<b>{row['value']:.4g}</b> "
    name = row["path"].rsplit("/", 1)[-1]
    picture = strips[_key(row)]
    shown = f"<img src='{picture}' alt=''>" if picture else "<div class=lost>not readable</div>"
    where = html.escape(f"{name}, {segment_of(row)}" if row.get("end") is not None else name)
    caption = html.escape((row.get("caption") or "")[:120])
    title = html.escape(row["path"], quote=True)
    return f"<figure title='{title}'>{shown}<figcaption>{value}{where}<br>{caption}</figcaption></figure>"


def _histogram(name: str, columns: dict[str, _Column], rules: Iterable[Rule]) -> str:
    """Return a histogram as SVG, with a line at each threshold."""
    column = columns[name]
    width, height = 480, 110
    top = max(1, int(column.counts.max()))
    low, high = float(column.edges[0]), float(column.edges[-1])
    at = (width * (column.edges - low) / (high - low)).tolist()
    bars = "".join(
        f"<rect x='{at[i]:.1f}' y='{height * (1 - count / top):.1f}' width='{max(at[i + 1] - at[i] - 1, 0.5):.1f}' "
        f"height='{height * count / top:.1f}'>"
        f"<title>{column.edges[i]:.4g} to {column.edges[i + 1]:.4g}: {count}</title></rect>"
        for i, count in enumerate(column.counts.tolist())
        if count
    )
    lines = "".join(
        f"<line x1='{(x := width * (rule.limit - low) / (high - low)):.1f}' x2='{x:.1f}' y1='0' y2='{height}'/>"
        for rule in rules
        if rule.column == name and rule.limit is not None
    )
    missing = f", {column.missing} without" if column.missing else ""
    return (
        f"<figure class=histogram><svg viewBox='0 0 {width} {height + 16}'>{bars}{lines}"
        f"<text x='0' y='{height + 13}'>{low:.4g}</text>"
        f"<text x='{width}' y='{height + 13}' text-anchor='end'>{high:.4g}</text></svg>"
        f"<figcaption><b>{html.escape(name)}</b>{missing}</figcaption></figure>"
    )


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px auto; max-width: 1400px; padding: 0 16px; color: #1c1c1e }
h1 { font-size: 20px } h2 { font-size: 16px; margin-top: 32px } h3 { font-size: 13px; margin: 12px 0 4px }
table { border-collapse: collapse } td, th { text-align: left; padding: 3px 16px 3px 0 }
.bar { display: inline-block; height: 9px; background: #c4453c }
.wall, .columns { display: flex; flex-wrap: wrap; gap: 10px }
.wall { border-left: 4px solid #c4453c; padding-left: 10px } .wall.pass { border-color: #3a8f55 }
figure { margin: 0; width: 330px } figure img { width: 100%; display: block }
figcaption { font-size: 12px; overflow-wrap: anywhere; color: #48484a }
.histogram { width: 440px } rect { fill: #6d8ab5 } line { stroke: #c4453c; stroke-width: 2 }
text { font-size: 12px; fill: #48484a } .lost { background: #eee; padding: 24px; text-align: center }
"""
