"""Manifests as tables: what is done by columns equals what is done entry by entry, and tables are kept and shared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.buckets import Bucket, choose_bucket
from stdit_data.errors import DataError
from stdit_data.manifests import table_cache
from stdit_data.manifests.columns import _plain_arrays, _plain_batch, check_row, checked_arrays, checked_batch
from stdit_data.manifests.entries import COLUMNS, Entries, Entry
from stdit_data.manifests.format import read_manifest, write_manifest
from stdit_data.manifests.identity import _float_texts, clips_identity
from stdit_data.manifests.metadata import Lengths, choose_buckets, is_picture, known_frames
from stdit_data.manifests.split import hash_position
from stdit_data.storage import urls
from stdit_data.video.segments import default_sampling

paths = st.text("ab./'\\:é\udcff", min_size=1, max_size=8) | st.sampled_from(
    [
        "s3://b/a.mp4",
        "zip://a.mp4::/x.zip",
        "/abs/a.mp4",
        "d/a.jpg",
        "d/b.PNG",
        ".jpg",
        "a.jpg.mp4",
        "https://h/a.png?x=1",
    ]
)
seconds = st.none() | st.floats(0, 100) | st.integers(0, 40).map(lambda n: round(n / 24, 3))
entries = st.builds(
    Entry,
    path=paths,
    start=seconds,
    end=seconds,
    fps=st.none() | st.sampled_from([24.0, 25.0, 30000 / 1001, 8.0, 12.0]) | st.floats(0.1, 1e6),
    num_frames=st.none() | st.integers(1, 60) | st.integers(2**52, 2**62),
    height=st.none() | st.integers(1, 4).map(lambda n: n * 120),
    width=st.none() | st.integers(1, 4).map(lambda n: n * 120),
) | st.builds(Entry, path=paths, start_frame=st.none() | st.integers(0, 90), end_frame=st.none() | st.integers(0, 90))
cells = st.sampled_from(
    [
        None,
        "",
        " ",
        "a.mp4",
        " a ",
        "nan",
        "None",
        "3",
        " 4 ",
        "5.0",
        "5.5",
        "0x1A",
        "1_0",
        "-1",
        "inf",
        1,
        2.0,
        2.5,
        0,
        2**63,
        2**53,
        True,
        float("nan"),
        float("inf"),
        b"a",
        [1],
        "\0",
        "é",
        "\udcff",
        "\ud800",
        "٣",
        "1e400",
        "\x1ca",
    ]
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_rows_are_checked_by_columns_as_one_by_one(data: st.DataObject) -> None:
    names = ["path", *data.draw(st.lists(st.sampled_from(COLUMNS[1:]), max_size=4, unique=True))]
    rows = data.draw(st.lists(st.tuples(*[cells] * len(names)), min_size=1, max_size=3))
    columns: dict[str, list[Any]] = {
        name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }
    try:
        expected = [check_row("x", dict(zip(names, row, strict=True))) for row in rows]
    except DataError as error:
        assert _plain_batch(columns) is None
        with pytest.raises(DataError) as caught:
            checked_batch(columns, lambda row: "x")
        assert str(caught.value) == str(error)
        return
    assert Entries(pa.Table.from_batches([checked_batch(columns, lambda row: "x")])) == expected


texts = st.none() | st.sampled_from(
    ["", "a.mp4", " a", "a\u3000", "\u00a0a", "\x1ca", "é", "。", "nan", "N/A", "\0", "a b"]
)
whole = st.none() | st.sampled_from([0, 1, 5, -1, 2**24])
arrays = (
    st.tuples(st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]), st.just(texts))
    | st.tuples(st.sampled_from([pa.int32(), pa.int64(), pa.float32(), pa.float64()]), st.just(whole))
    | st.just((pa.float64(), st.none() | st.floats(-1, 100) | st.sampled_from([np.nan, np.inf, 2.0**53])))
    | st.sampled_from([(pa.bool_(), st.booleans()), (pa.null(), st.none()), (pa.uint64(), st.just(2**63))])
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_arrays_are_checked_as_rows_are(data: st.DataObject) -> None:
    names = ["path", *data.draw(st.lists(st.sampled_from(COLUMNS[1:]), max_size=4, unique=True))]
    count = data.draw(st.integers(1, 3))
    columns: dict[str, pa.Array] = {}
    for name in names:
        kind, values = data.draw(arrays) if name != "path" else (pa.string(), texts)
        columns[name] = pa.array(data.draw(st.lists(values, min_size=count, max_size=count)), kind)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*map(pa.Array.to_pylist, columns.values()), strict=True)]
    try:
        expected = [check_row("x", row) for row in rows]
    except DataError as error:
        assert _plain_arrays(columns) is None
        with pytest.raises(DataError) as caught:
            checked_arrays(columns, lambda row: "x")
        assert str(caught.value) == str(error)
        return
    assert Entries(pa.Table.from_batches([checked_arrays(columns, lambda row: "x")])) == expected


def test_usual_arrays_are_not_checked_row_by_row() -> None:
    columns = {
        "path": pa.array(["a.mp4", "é.mp4"]),
        "caption": pa.array(["two words", None]),
        "fps": pa.array([24, None]),
    }
    batch = _plain_arrays(columns)
    assert batch is not None
    assert batch.to_pylist()[1] == {"path": "é.mp4".encode(), "caption": None, "fps": None}


def test_seconds_are_written_as_python_writes_them() -> None:
    """In the text whose checksum is a data set's identity."""
    drawn = np.random.default_rng(0).random(20_000)
    values = np.concatenate(
        [drawn * 1000, np.round(drawn * 1000, 3), np.arange(20_000) / 29.97, 10 ** (24 * drawn - 8)]
    )
    for part in np.array_split(values, 7):
        array = pa.array([*part.tolist(), 0.0, 5.0, 1e9, None])
        assert _float_texts(array).to_pylist() == [repr(value) for value in array.to_pylist()]
        usual = array.filter(pa.array([value is None or 1e-4 <= value < 1e9 for value in array.to_pylist()]))
        assert _float_texts(usual).to_pylist() == [repr(value) for value in usual.to_pylist()]


def test_a_kept_table_is_opened_without_pandas(tmp_path: Path) -> None:
    """pyarrow imports it for conversions: a second and 60 MB in each process."""
    code = f"""
import os, sys
from stdit_data.buckets import Bucket
from stdit_data.datasets.videos import open_videos
from stdit_data.manifests import table_cache
from stdit_data.manifests.format import Entry, write_manifest
table_cache.LEAST = 1
sizes = dict(fps=25.0, width=640, height=360, num_frames=100)
url = {str(tmp_path / "set.csv")!r}
if not os.path.exists(url):
    write_manifest(url, [Entry(f"{{i}}.mp4", "x", start=0.5 * i, end=9 + i, **sizes) for i in range(9)])
open_videos(url, buckets=[Bucket(4, 32, 32), Bucket(8, 32, 64)])
print("pandas" in sys.modules)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert run[1] == "False\n"


@settings(deadline=None, max_examples=200)
@given(wanted=st.lists(entries, min_size=1, max_size=6), interval=st.sampled_from([None, 1, 3]))
def test_lengths_and_buckets_by_columns(wanted: list[Entry], interval: int | None) -> None:
    shapes = [Bucket(4, 120, 120), Bucket(4, 120, 240), Bucket(13, 240, 120), Bucket(1, 120, 120)]
    samplings = {shape: default_sampling(shape.frames, interval, None if interval else 8.0) for shape in shapes}
    table = Entries.of(wanted)
    lengths = Lengths(table)
    chosen = choose_buckets(table, lengths, samplings)
    for row, entry in enumerate(wanted):
        frames = known_frames(entry)
        got = lengths.frames[row]
        assert np.isnan(got) if frames is None else (got == frames or frames > 2**52), entry
        assert lengths.pictures[row] == is_picture(entry)
        for sampling in samplings.values():
            unknown = is_picture(entry) or frames is None or (sampling.fps is not None and entry.fps is None)
            assert lengths.short(sampling)[row] == (not unknown and frames < sampling.span(entry.fps or 1.0))
        expected = shapes[0]
        if entry.width and entry.height:
            fits = [s.frames for s, f in samplings.items() if frames is not None and f.span(entry.fps or 1.0) <= frames]
            fitting = 1 if is_picture(entry) else max(fits, default=0)
            expected = choose_bucket(shapes, fitting, entry.height, entry.width)
        assert chosen[row] == expected, entry


@settings(deadline=None, max_examples=200)
@given(
    wanted=st.lists(entries, min_size=2, max_size=6),
    folder=st.sampled_from(["", "/x/set", "é/set", "/it's", "s3://bucket/set", "zip://in::/x.zip", "."]),
)
def test_the_identity_is_that_of_saved_runs(wanted: list[Entry], folder: str) -> None:
    heads = [urls.layers(urls.join(folder, entry.path))[0] for entry in wanted]
    shared = len(os.path.commonprefix(heads).rpartition("/")[0])  # noqa: RUF071
    crc = 0
    for entry, head in zip(wanted, heads, strict=True):
        archives = [Path(layer).name for layer in urls.layers(urls.join(folder, entry.path))[1:]]
        cut = repr(entry.segment).replace("Segment", "Cut", 1)
        crc = zlib.crc32(f"({head[shared:].lstrip('/')!r}, {archives!r}, {cut})".encode(), crc)
    assert clips_identity(folder, Entries.of(wanted)) == crc


def test_entries_are_a_sequence() -> None:
    wanted = [Entry(f"{i}.mp4", "a" * (i % 3), start_frame=i or None, weight=0.5 * i) for i in range(10)]
    table = Entries.of(wanted)
    assert table == wanted
    assert (table[3], table[-1], list(table[2:5])) == (wanted[3], wanted[9], wanted[2:5])
    for rows in ([7, 2, 2], [1, 4, 9], []):
        assert table.take(rows) == [wanted[row] for row in rows]
    assert list(table.take([9, 1]).paths()) == ["9.mp4", "1.mp4"]
    assert table.take([5, 0]).take([1]) == wanted[:1]
    with pytest.raises(IndexError):
        table[10]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_is_written_once_and_read_again_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "LEAST", 1)
    url, wanted = str(tmp_path / f"set{suffix}"), [Entry(f"{i}.mp4", f"clip {i}", fps=i + 1.0) for i in range(200)]
    write_manifest(url, wanted)
    assert read_manifest(url).entries == wanted
    folder = tmp_path / "cache/stdit/manifests"
    (first,) = folder.glob("*.arrow")
    with monkeypatch.context() as patch:
        for name in ("checked_batch", "checked_arrays"):  # it is not read again
            patch.setattr(f"stdit_data.manifests.format.{name}", None)
        again = read_manifest(url)
    assert again.entries == wanted
    Path(url).write_bytes(Path(url).read_bytes())  # as long as before
    assert read_manifest(url).entries == wanted
    (second,) = folder.glob("*.arrow")  # in place of the first
    assert second != first
    assert again.entries[199] == wanted[199]  # still mapped
    left, writing = (folder / f".{second.name}.{number}.part" for number in (1, 2))
    for unfinished in (left, writing):
        unfinished.touch()
    os.utime(left, (0, 0))  # of a killed process
    second.write_bytes(second.read_bytes()[:1000])
    assert read_manifest(url).entries == wanted
    assert (left.exists(), writing.exists()) == (False, True)
    write_manifest(url, wanted[:5])
    assert read_manifest(url).entries == wanted[:5]


def test_without_a_cache_folder_every_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "LEAST", 1)
    write_manifest(f"{tmp_path}/set.csv", [Entry("a.mp4", "a")])
    assert read_manifest(f"{tmp_path}/set.csv").entries == [Entry("a.mp4", "a")]


@given(st.lists(st.sampled_from(["a", "b.mp4", "..", ".", "", "é", "~", "s3:", ".h"]), min_size=1, max_size=5))
def test_the_fast_way_to_a_place_in_the_split_is_the_slow_one(parts: list[str]) -> None:
    url = "/".join(parts)
    head = urls.layers(urls.canonical(url))[0]
    text = "\n".join(PurePosixPath(head).parts[-2:])
    assert hash_position(url) == int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


def test_spans_that_are_met_exactly(tmp_path: Path) -> None:
    """A clip of just as many frames as needed, at a rate that no float holds."""
    sampling = default_sampling(13, None, 10.0)
    rate = 30000 / 1001
    need = 12 * Fraction(rate) / 10 + 1
    table = Entries.of([Entry("a.mp4", fps=rate, num_frames=n) for n in (int(need), int(need) + 1)])
    assert Lengths(table).short(sampling).tolist() == [True, False]
    exact = Entries.of([Entry("a.mp4", fps=30.0, num_frames=n) for n in (36, 37)])
    assert Lengths(exact).short(sampling).tolist() == [True, False]
