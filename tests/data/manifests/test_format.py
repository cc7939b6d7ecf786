"""Manifests of every kind, from every place, and what is said of wrong ones."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry, known_implementations
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data import files
from stdit_data.errors import ClipError, DataError
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.manifests.rows import csv_rows
from stdit_data.manifests.values import MISSING
from stdit_data.video.frames import Segment
from stdit_data.video.probe import probe

FULL = [
    Entry(
        "a/b.mp4", "A dog, a cat.", start=0.5, end=2.25, fps=29.97, width=640, height=360, num_frames=300, weight=2.0
    ),
    Entry("c.mp4", 'He says "go"\non two lines', source="here", licence="CC0", sha256="ab" * 32),
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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            "file_name,caption\nx.mp4,hi\n",
            "no column 'path'; found file_name, caption; known columns: path, caption,",
        ),
        ("a.csv", "path,caption\nx.mp4,A dog, running\n", "line 2: 3 cells for 2 columns; quote captions"),
        ("a.csv", "x.mp4,A dog\ny.mp4,A dog, running, fast\n", "line 2: 4 cells; without a header"),
        ("a.csv", "path,caption,fps\nx.mp4,hi,fast\n", "line 2: fps is 'fast'; expected a number"),
        ("a.csv", "path,caption,num_frames\nx.mp4,hi,3.5\n", "num_frames is '3.5'; expected a whole number"),
        ("a.csv", "path,caption,width\nx.mp4,hi,-3\n", "width is -3; expected a number above 0"),
        ("a.csv", "path,caption\n,hi\n", "line 2: no path"),
        ("a.csv", "path,caption,start,end\nx.mp4,hi,4,2\n", "the segment ends at 2 and starts at 4"),
        ("a.csv", "path,start,end_frame\nx.mp4,0,50\n", "both start/end and start_frame/end_frame"),
        ("a.csv", "path,path\nx.mp4,y.mp4\n", "column 'path' occurs twice"),
        ("a.csv", "path,caption\n", "no entries"),
        ("a.csv", "", "no entries"),
        ("a.jsonl", '{"path": "x.mp4"}\n{"path": \n', "line 2: not JSON"),
        ("a.jsonl", '["x.mp4"]\n', "line 1: found a list; expected an object"),
        ("a.jsonl", '{"file": "x.mp4", "video": "x.mp4"}\n', "column 'path' occurs twice"),
        ("a.csv", 'path,caption\nx.mp4,"Stop!" he cries\ny.mp4,two\n', "line 2: a quote that is not closed"),
        ("a.csv", 'path,caption\nx.mp4,one\ny.mp4,"two\nz.mp4,three\n', "line 3: a quote that is not closed"),
        ("a.csv", 'path,caption\nx.mp4,"two\nlines"\ny.mp4,"open\nz.mp4,"three"\n', "line 4: a quote"),
        ("a.csv", 'path,caption\nx.mp4, "open\ny.mp4,two\n', "line 2: a quote that is not closed"),
        ("a.tsv", 'path\tcaption\nx.mp4\t"Wow" she said\n', "line 2: a quote"),
        ("a.csv", 'x.mp4,"open\ny.mp4,two\n', "line 1: a quote that is not closed"),
        ("a.csv", "path,caption\nx.mp4,one\ny.mp4,nan\n", "line 3: caption is 'nan', a missing value written as text"),
        ("a.csv", "path,caption\nx.mp4, None \n", "line 2: caption is 'None', a missing value"),
        ("a.csv", "path,caption\nNaN,one\n", "line 2: path is 'NaN'"),
        ("a.csv", "path,start\nx.mp4,nan\n", "line 2: start is 'nan'; expected a number"),
        ("a.csv", "path,num_frames\nx.mp4,1e400\n", "line 2: num_frames is '1e400'; expected a whole number"),
        ("a.csv", "path,caption\na\0.mp4,one\n", "line 2: path is 'a\\x00.mp4'; expected the video's path"),
        (
            "a.jsonl",
            '{"path": "x.mp4"}\n{"path": "y.mp4", "caption": ["a"]}\n',
            "line 2: caption is a list; expected text",
        ),
        ("a.jsonl", '{"path": "x.mp4", "caption": {"short": "a"}}\n', "line 1: caption is an object; expected text"),
        ("a.jsonl", '{"path": "x.mp4", "caption": 5}\n', "line 1: caption is 5; expected text"),
        ("a.jsonl", '{"path": "x.mp4", "caption": true}\n', "line 1: caption is true; expected text"),
        ("a.jsonl", '{"path": "x.mp4", "caption": "null"}\n', "line 1: caption is 'null', a missing value"),
        ("a.jsonl", '{"path": "x.mp4", "caption": "half \\ud83d"}\n', "caption is not UTF-8 text at character 6"),
        ("a.jsonl", '{"path": ["x.mp4"]}\n', "line 1: path is a list; expected text"),
        ("a.jsonl", '{"path": "x.mp4", "width": true}\n', "line 1: width is true; expected a whole number"),
        ("a.jsonl", '{"path": "x.mp4", "width": Infinity}\n', "line 1: width is inf; expected a whole number"),
        ("a.jsonl", '{"path": "x.mp4", "fps": [25]}\n', "line 1: fps is a list; expected a number"),
        ("a.jsonl", '{"path": "x.mp4", "source": {"id": 1}}\n', "line 1: source is an object; expected text"),
        ("a.jsonl", '{"path": "x.mp4", "path ": "y.mp4"}\n', "line 1: key 'path' occurs twice"),
        ("a.jsonl", '{"path": "x.mp4", "n": ' + "9" * 5000 + "}\n", "line 1: "),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.parquet", "not parquet at all", "not Parquet"),
        ("a.xlsx", "", "expected a folder or a manifest"),
    ],
)
def test_wrong_manifests(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_manifest(str(path))
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("path,caption\nx.mp4,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 2: caption is not UTF-8 text at character 4; save the file as UTF-8"):
        read_manifest(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes("path,caption\nx.mp4,one\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8 text"):
        read_manifest(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"caption": pa.array([b"a dog"])}, "row 0: caption is bytes; expected text"),
        ({"caption": pa.array([["a dog", "a brown dog"]])}, "row 0: caption is a list; expected text"),
        ({"caption": pa.array([{"short": "a dog"}])}, "row 0: caption is an object; expected text"),
        ({"caption": pa.array([1.5])}, "row 0: caption is 1.5; expected text"),
        ({"num_frames": pa.array([3.5])}, "row 0: num_frames is 3.5; expected a whole number"),
        ({"start": pa.array([1000], pa.duration("ms"))}, "row 0: start is "),
        ({" path": pa.array(["b.mp4"])}, "column 'path' occurs twice"),
    ],
)
def test_wrong_columns_of_parquet(tmp_path: Path, columns: dict[str, pa.Array], words: str) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], **columns}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.parquet(, |: ){words}"):
        read_manifest(str(tmp_path / "a.parquet"))


def test_missing_values_of_parquet_and_json_are_empty_cells(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "caption": [float("nan")], "fps": [None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"path": "a.mp4", "caption": NaN, "fps": null, "source": 7, "width": 3.0}\n')
    assert read_manifest(str(tmp_path / "a.parquet")).entries == [Entry("a.mp4")]
    assert read_manifest(str(tmp_path / "a.jsonl")).entries == [Entry("a.mp4", source="7", width=3)]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "a.parquet"), [Entry(f"{i}.mp4", f"clip {i}") for i in range(1000)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet, or damaged"):
        read_manifest(str(tmp_path / "a.parquet"))


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


def test_captions_beside_videos_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("None\n")
    with pytest.raises(DataError, match=r"a\.txt: the caption is 'None', a missing value written as text"):
        read_manifest(str(tmp_path))
    with pytest.raises(DataError, match=r"b\.csv: a\.mp4: the caption is not UTF-8 text"):
        write_manifest(str(tmp_path / "b.csv"), [Entry("a.mp4", "half \ud83d")])


@pytest.mark.parametrize("packed", [False, True])
def test_a_caption_of_any_size_is_read_no_further_than_64_kib(tmp_path: Path, packed: bool) -> None:
    caption = "long " * 13_000
    source = f"zip://::{tmp_path}/set.zip" if packed else str(tmp_path / "set")

    def write(text: bytes) -> None:
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set/a.txt").write_bytes(text)
        (tmp_path / "set/a.mp4").touch()
        files._archive.cache_clear()
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("a.txt", "a.mp4"):
                archive.write(tmp_path / "set" / name, name)

    write(caption.encode())
    assert read_manifest(source).entries[0].caption == caption.strip()
    write(b"a" * (32 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.txt.*: larger than 64 KiB"):
        read_manifest(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_paths_that_lead_out_are_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "in", other):
        folder.mkdir(parents=True)
        (folder / "a.mp4").touch()
    (root / "link").symlink_to(other)
    (root / "up.mp4").symlink_to(other / "a.mp4")
    (root / "same.mp4").symlink_to(root / "in/a.mp4")
    for inside in ("in/a.mp4", "./in/a.mp4", "same.mp4", "in/..a.mp4", "none.mp4", "a::b.mp4"):
        write_manifest(f"{root}/set.csv", [Entry(inside)])
        assert read_manifest(f"{root}/set.csv", confine=True) == read_manifest(f"{root}/set.csv")
    outside = [
        "../other/a.mp4", "in/../../other/a.mp4", f"{other}/a.mp4", f"{root}/in/a.mp4", "link/a.mp4", "up.mp4",
        f"file://{other}/a.mp4", "http://127.0.0.1/a.mp4", "zip://a.mp4::/x.zip",
    ]  # fmt: skip
    for path in outside:
        write_manifest(f"{root}/set.csv", [Entry("in/a.mp4"), Entry(path)])
        assert read_manifest(f"{root}/set.csv").entries[1].path == path
        with pytest.raises(DataError, match=rf"^{root}/set.csv: path '{re.escape(path)}' leads out of {root}, which"):
            read_manifest(f"{root}/set.csv", confine=True)
    with pytest.raises(DataError, match="leads out"):
        read_manifest(str(root), confine=True)
    for path in ("../b.mp4", "%2e%2e/b.mp4", "a/%2E./b.mp4", "/b.mp4", "s3://b/b.mp4"):
        assert files.leads_out("https://host/set", path)
    assert not files.leads_out("https://host/set", "a/b%20c.mp4")
    assert not files.leads_out("zip://in::/x.zip", "a/b.mp4")
    assert files.leads_out("zip://in::/x.zip", "../b.mp4")


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
        csv_rows("a.csv", text[:-2] + "\n")  # the last closing quote


def test_nothing_there(tmp_path: Path) -> None:
    for name in ("none.csv", "none"):
        with pytest.raises(DataError, match=f"{name}: no such"):
            read_manifest(str(tmp_path / name))
    with pytest.raises(DataError, match=r"no videos \(.mp4, .mkv"):
        read_manifest(str(tmp_path))
    with pytest.raises(DataError, match="expected a name ending in"):
        write_manifest(str(tmp_path / "a.txt"), FULL)


def test_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/x.webm", "c.PNG", ".hidden/y.mp4", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/x.txt").write_text("A dog\n runs ")
    manifest = read_manifest(str(tmp_path))
    assert manifest.entries == [Entry("a/x.webm", "A dog runs"), Entry("b.mp4"), Entry("c.PNG")]
    assert manifest.locate(manifest.entries[0]) == str(tmp_path / "a/x.webm")


def test_memory_and_zip(tmp_path: Path) -> None:
    """The same folder and the same manifest behind other URLs."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("clips/a.mp4", b"x")
        archive.writestr("clips/a.txt", "A dog")
        archive.writestr("sets/all.csv", "path,caption\n../clips/a.mp4,A dog\n")
        archive.writestr("all.csv", "path,caption\nclips/a.mp4,A dog\n")
    memory = fsspec.filesystem("memory")
    memory.pipe("/there/clips/a.mp4", b"x")
    memory.pipe("/there/clips/a.txt", b"A dog")
    memory.pipe("/there/all.csv", b"path,caption\nclips/a.mp4,A dog\n")
    inside = f"::{tmp_path}/set.zip"
    for source, located in (
        (f"zip://clips{inside}", f"zip://clips/a.mp4{inside}"),
        (f"zip://all.csv{inside}", f"zip://clips/a.mp4{inside}"),
        ("memory://there/clips", "memory://there/clips/a.mp4"),
        ("memory://there/all.csv", "memory://there/clips/a.mp4"),
    ):
        manifest = read_manifest(source)
        assert [entry.caption for entry in manifest.entries] == ["A dog"], source
        assert manifest.locate(manifest.entries[0]) == located
        with files.open_binary(located) as file:
            assert file.read() == b"x"


def test_root_and_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,caption\nx.mp4,1\n/abs/y.mp4,2\ns3://bucket/z.mp4,3\n")
    manifest = read_manifest(str(tmp_path / "a.csv"), root="/videos")
    located = [manifest.locate(entry) for entry in manifest.entries]
    assert located == ["/videos/x.mp4", "/abs/y.mp4", "s3://bucket/z.mp4"]


def test_suffixes_of_urls() -> None:
    assert files.suffix("zip://a/b.MP4::/x/set.zip") == ".mp4"
    assert files.suffix("https://host/a.csv?key=1.2#part") == ".csv"
    assert files.suffix("/odd/what?.mp4") == ".mp4"
    assert files.is_image("s3://bucket/a.JPG")


def test_unknown_and_missing_protocols() -> None:
    with pytest.raises(DataError, match="Protocol not known: nothing"):
        read_manifest("nothing://a.csv")


def test_cuts_count_frames() -> None:
    """A cut's length in frames, in seconds or in frames, whatever decimals it is written in."""
    assert Segment().frames(30, 100) == 100
    assert Segment(start=1.0, end=2.0).frames(30, 100) == 30
    assert Segment(start=0.333, end=0.667).frames(30, 100) == 10  # frames 10 to 19
    assert Segment(start_frame=10, end_frame=25).frames(24, 100) == 15
    assert Segment(start_frame=90, end_frame=250).frames(24, 100) == 10
    assert Segment(start=50).frames(30, 100) == 0
    parts = [Segment(start=round(a / 24, 3), end=round(b / 24, 3)) for a, b in itertools.pairwise([0, 7, 19, 48])]
    assert sum(part.frames(24, 48) for part in parts) == 48  # scenes that follow one another share no frame


@pytest.mark.parametrize(
    ("protocol", "extra", "package"),
    [("s3", "s3", "s3fs"), ("gs", "gs", "gcsfs"), ("hf", "hf", "huggingface_hub"), ("https", "https", "aiohttp")],
)
@pytest.mark.parametrize("url", ["{}://bucket/set.csv", "zip://set.csv::{}://bucket/set.zip"])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, protocol: str, extra: str, package: str, url: str
) -> None:
    """With the package hidden, whether it is installed here or not."""
    implementation = known_implementations[protocol]["class"].rpartition(".")[0]
    _registry.pop(protocol, None)
    for name in (package, implementation):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"install stdit-data\[{extra}\]$") as caught:
        read_manifest(url.format(protocol))
    assert "\n" not in str(caught.value)
    _registry.pop(protocol, None)


class Unreachable(AbstractFileSystem):
    """A place whose client has errors of its own, as those of hf:// and s3:// do."""

    class ClientError(Exception):
        pass

    def info(self, path: str, **_: object) -> dict:
        if path.endswith(".mp4"):
            return {"name": path, "size": 100, "type": "file"}
        raise self.ClientError("Name or service\nnot known")

    def exists(self, path: str, **_: object) -> bool:  # the base class would take any error for a no
        return bool(self.info(path))

    def _open(self, path: str, **_: object) -> io.RawIOBase:
        class File(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                raise Unreachable.ClientError("connection reset")

            def seek(self, offset: int, whence: int = 0) -> int:
                return 0

        return File()


def test_what_a_remote_client_raises_is_one_line_that_names_the_url() -> None:
    fsspec.register_implementation("nowhere", Unreachable, clobber=True)
    with pytest.raises(OSError, match=r"^nowhere://set.csv: ClientError: Name or service not known$"):
        read_manifest("nowhere://set.csv")
    with pytest.raises(ClipError, match=r"nowhere://a.mp4: .*connection reset"):
        probe("nowhere://a.mp4")


def test_zip_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a\.zip: not a zip file"):
        read_manifest(f"zip://set.csv::{tmp_path}/a.zip")
    with pytest.raises(DataError, match=r"none\.zip: no such file"):
        read_manifest(f"zip://set.csv::{tmp_path}/none.zip")
    with pytest.raises(DataError, match=r"found \.zip; give its contents as zip://::.*a\.zip$"):
        read_manifest(f"{tmp_path}/a.zip")
