"""Files are written whole or not at all, and what goes wrong is one line that names the file."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdit_data.errors import ClipError, DataError, FileError, MissingFileError
from stdit_data.storage import atomic, files, listing, urls
from stdit_data.video.probe import probe


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with atomic.write_atomically(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert contents(tmp_path) == {"a.txt": b"new"}


def test_a_folder_is_replaced_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with atomic.write_atomically(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert contents(tmp_path) == {"a/new": b"new"}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_what_was_there_and_nothing_else(
    folder: bool, error: BaseException, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), atomic.write_atomically(tmp_path / "a") as partial:
        if folder:
            partial.mkdir()
        (partial / "new" if folder else partial).write_text("half")
        raise error
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_url_is_written_whole_or_not_at_all(where: str, tmp_path: Path) -> None:
    url = f"{tmp_path}/new/a.bin" if where == "local" else f"memory://{tmp_path.name}/new/a.bin"
    with atomic.open_write(url) as file:
        file.write(b"one")
    with pytest.raises(ValueError, match="no"), atomic.open_write(url) as file:
        file.write(b"half")
        raise ValueError("no")
    with files.open_binary(url) as file:
        assert file.read() == b"one"
    fs, path = files.filesystem(url)
    assert [name.rsplit("/", 1)[-1] for name in fs.ls(path.rpartition("/")[0], detail=False)] == ["a.bin"]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(MissingFileError, match=rf"^{path}: no such file or folder$"):
        atomic.replace_text(path, "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file: File exists$") as caught, atomic.open_write(f"{tmp_path}/file/a.txt"):
        pass
    assert isinstance(caught.value, DataError)
    assert "Errno" not in str(caught.value)


def test_a_store_that_fails_leaves_nothing_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ClientError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ClientError("slow down")

    url = f"memory://{tmp_path.name}/a.bin"
    monkeypatch.setattr(fsspec.filesystem("memory"), "mv", fail)
    with pytest.raises(FileError, match=rf"^{url}: ClientError: slow down$"), atomic.open_write(url) as file:
        file.write(b"one")
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}") == []


def test_an_unfinished_file_that_is_gone_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="the unfinished file is gone"), atomic.write_atomically(tmp_path / "a"):
        pass


def test_a_local_archive_with_two_colons_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "x::y"
    folder.mkdir()
    with zipfile.ZipFile(folder / "set::1.zip", "w") as archive:
        archive.writestr("in/a.mp4", b"x")
    url = f"zip://in::{folder}/set::1.zip"
    assert listing.walk(url) == ["a.mp4"]
    assert urls.join(str(folder), "a::b.mp4") == f"{folder}/a::b.mp4"
    assert urls.parent(f"{folder}/a::b.mp4") == str(folder)
    with files.open_binary(urls.join(url, "a.mp4")) as file:
        assert file.read() == b"x"


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for file in (root / "z" / "a.mp4", root / "b.mp4", other / "deep" / "c.mp4", other / "d.mp4"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "again").symlink_to(root / "z")  # in the folder itself: keeps its own name
    (root / "linked").symlink_to(other)
    (root / "linked2").symlink_to(other)
    (root / "file.mp4").symlink_to(other / "d.mp4")
    (root / "z" / "up").symlink_to(root)
    (other / "deep" / "back").symlink_to(other)
    (root / "self").symlink_to(root / "self")
    (root / "lost.mp4").symlink_to(tmp_path / "none.mp4")
    (root / ".hidden").symlink_to(other)
    assert [name for name in listing.walk(str(root)) if name.endswith(".mp4")] == [
        "b.mp4",
        "file.mp4",
        "linked/d.mp4",
        "linked/deep/c.mp4",
        "lost.mp4",
        "z/a.mp4",
    ]
    (tmp_path / "set").symlink_to(root)
    assert listing.walk(str(tmp_path / "set")) == listing.walk(str(root))


def test_a_missing_path_with_backslashes_is_explained(tmp_path: Path) -> None:
    hint = "no such file; it has backslashes: separate folders by /$"
    with pytest.raises(MissingFileError, match=hint), files.open_media(f"{tmp_path}/sub\\a.mp4"):
        pass
    with pytest.raises(ClipError, match=hint):
        probe(f"{tmp_path}/sub\\a.mp4")
    with pytest.raises(ClipError, match=r"no such file$"):
        probe(f"{tmp_path}/sub/a.mp4")


@given(st.binary(min_size=1, max_size=12))
def test_names_that_are_not_utf8_are_shown_and_come_back_from_json(name: bytes) -> None:
    text = os.fsdecode(name)
    line = files.json_line({"path": text})
    assert json.loads(line.decode()) == {"path": text}
    assert urls.is_utf8(urls.printable(text))
    with TemporaryDirectory() as folder:
        atomic.replace_text(f"{folder}/a.json", json.dumps(text, ensure_ascii=False))
        assert json.loads(files.read_text(f"{folder}/a.json")) == text
    assert (urls.printable(text) == text) == urls.is_utf8(text)
