"""What is said of manifests that are wrong."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit_data.errors import DataError
from stdit_data.manifests.format import Entry, read_manifest, write_manifest


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


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "a.parquet"), [Entry(f"{i}.mp4", f"clip {i}") for i in range(1000)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet, or damaged"):
        read_manifest(str(tmp_path / "a.parquet"))


def test_captions_beside_videos_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("None\n")
    with pytest.raises(DataError, match=r"a\.txt: the caption is 'None', a missing value written as text"):
        read_manifest(str(tmp_path))
    with pytest.raises(DataError, match=r"b\.csv: a\.mp4: the caption is not UTF-8 text"):
        write_manifest(str(tmp_path / "b.csv"), [Entry("a.mp4", "half \ud83d")])


def test_nothing_there(tmp_path: Path) -> None:
    for name in ("none.csv", "none"):
        with pytest.raises(DataError, match=f"{name}: no such"):
            read_manifest(str(tmp_path / name))
    with pytest.raises(DataError, match=r"no videos \(.mp4, .mkv"):
        read_manifest(str(tmp_path))
    with pytest.raises(DataError, match="expected a name ending in"):
        write_manifest(str(tmp_path / "a.txt"), [Entry("a.mp4")])
