"""What is written to a manifest of any kind is read, and what others write too."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.errors import DataError
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.manifests.rows import csv_rows
from stdit_data.manifests.values import MISSING
from stdit_data.storage import files

FULL = [
    Entry(
        "a/b.mp4", "A dog, a cat.", start=0.5, end=2.25, fps=29.97, width=640, height=360, num_frames=300, weight=2.0
    ),
    Entry("c.mp4", 'He says "go"\non two lines', source="here", licence="CC0", sha256="ab" * 32, group="7"),
    Entry("ü/雪.mp4", "", start_frame=3, end_frame=60),
]
text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map(str.strip)
entries = st.builds(
    Entry,
    path=st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?\.mp4", fullmatch=True),
    caption=text.filter(lambda caption: caption.lower() not in MISSING),
    fps=st.none() | st.floats(0.1, 240),
    width=st.none() | st.integers(1, 10**6),
    weight=st.none() | st.floats(0, 100),
    source=st.none() | text.filter(bool),
    group=st.none() | text.filter(bool),
    start=st.none() | st.floats(0, 1e6),
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"set{suffix}")
    assert write_manifest(path, FULL) == 3
    assert read_manifest(path).entries == FULL
    assert [p.name for p in tmp_path.iterdir()] == [f"set{suffix}"]  # nothing half-written is left beside it


@settings(deadline=None, max_examples=40)
@given(wanted=st.lists(entries, min_size=1, max_size=5))
def test_any_entries_survive_every_format(wanted: list[Entry]) -> None:
    for suffix in (".csv", ".jsonl", ".parquet"):
        url = f"memory://manifest/set{suffix}"
        write_manifest(url, wanted)
        assert read_manifest(url).entries == wanted


@pytest.mark.parametrize("rows", [
    "videos/a.mp4,A dog runs,51\nvideos/b.mp4,\"A cat, asleep\",16\n",
    "videos/a.mp4,A dog runs\nvideos/b.mp4,\"A cat, asleep\"\n",
    "\ufeffvideos/a.mp4,A dog runs,51\r\n\r\nvideos/b.mp4,\"A cat, asleep\",\r\n",
])  # fmt: skip
def test_open_sora_csv_without_header(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(rows.encode())
    first, second = read_manifest(str(path)).entries
    assert (first.path, first.caption, second.caption) == ("videos/a.mp4", "A dog runs", "A cat, asleep")
    assert first.num_frames == (51 if ",51" in rows else None)


def test_header_is_not_case_sensitive_and_other_columns_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("id,Path,TEXT,num_frames,license\n7,a.mp4,A dog,51.0,CC0\n8,b.mp4,A cat,,\n")
    assert read_manifest(str(path)).entries == [
        Entry("a.mp4", "A dog", num_frames=51, licence="CC0"),
        Entry("b.mp4", "A cat"),
    ]


def test_missing_values_of_parquet_and_json_are_empty_cells(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "caption": [float("nan")], "fps": [None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"path": "a.mp4", "caption": NaN, "fps": null, "source": 7, "width": 3.0}\n')
    assert read_manifest(str(tmp_path / "a.parquet")).entries == [Entry("a.mp4")]
    assert read_manifest(str(tmp_path / "a.jsonl")).entries == [Entry("a.mp4", source="7", width=3)]


def test_spaces_around_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{" path":"a.mp4","Caption ":"one"}\n')
    (tmp_path / "a.csv").write_text(' path , Caption \na.mp4, "one"\n')
    pq.write_table(pa.table({"path ": ["a.mp4"], " TEXT": ["one"], "other. ": [1]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert read_manifest(str(tmp_path / name)).entries == [Entry("a.mp4", "one")], name


def test_long_captions_and_unusual_line_ends(tmp_path: Path) -> None:
    """Longer than `csv.field_size_limit`, whose value stays; and lines that end at newlines alone."""
    limit = csv.field_size_limit()
    captions = ["long " * 40_000, *(f"one{end}two" for end in ("\u2028", "\u2029", "\u0085", "\v", "\f", "\x1e", "\r"))]
    wanted = [Entry("a.mp4", caption.strip()) for caption in captions]
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        write_manifest(str(tmp_path / f"a{suffix}"), wanted)
        assert read_manifest(str(tmp_path / f"a{suffix}")).entries == wanted, suffix
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", [b"\xff\xfe.mp4", b"caf\xe9/b\xfc.mp4", b" space.mp4", b"a::b.mp4", b"two\nlines.mp4"])
def test_any_file_name_is_listed_written_and_read(tmp_path: Path, name: bytes, suffix: str) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"clips", name))  # noqa: PTH118
    Path(path).parent.mkdir(parents=True)
    Path(path).write_bytes(b"x")
    folder = read_manifest(str(tmp_path / "clips"))
    for entries, at in ((folder.entries, "clips/"), ([Entry(path)], "")):
        manifest = str(tmp_path / f"{at}set{suffix}")
        write_manifest(manifest, entries)
        again = read_manifest(manifest)
        located = again.locate(again.entries[0])
        assert Path(located).samefile(path)
        with files.open_binary(located) as file:
            assert file.read() == b"x"


@settings(deadline=None, max_examples=60)
@given(cells=st.lists(st.text('", \n\rab', max_size=6), min_size=1, max_size=4))
def test_csv_is_read_as_it_was_meant_or_not_at_all(cells: list[str]) -> None:
    """What a CSV writer quotes comes back, and a quote that is left out does not swallow a line."""
    target = io.StringIO(newline="")
    rows = [[f"{number}.mp4", cell] for number, cell in enumerate(cells)]
    csv.writer(target, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    text = target.getvalue()
    assert [row for _, row in csv_rows("a.csv", text)] == rows
    with pytest.raises(DataError, match=r"^a\.csv, line \d+: a quote"):
        list(csv_rows("a.csv", text[:-2] + "\n"))  # the last closing quote


def test_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/x.webm", "c.PNG", ".hidden/y.mp4", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/x.txt").write_text("A dog\n runs ")
    manifest = read_manifest(str(tmp_path))
    assert manifest.entries == [Entry("a/x.webm", "A dog runs"), Entry("b.mp4"), Entry("c.PNG")]
    assert manifest.locate(manifest.entries[0]) == str(tmp_path / "a/x.webm")


def test_groups_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("path,group\na.mp4,12\nb.mp4,\n")
    (tmp_path / "set.jsonl").write_text('{"path": "a.mp4", "group": 12}\n{"path": "b.mp4"}\n')
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "group": [12, None]}), tmp_path / "set.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        found = read_manifest(tmp_path / f"set.{suffix}").entries
        assert [entry.group for entry in found] == ["12", None]
