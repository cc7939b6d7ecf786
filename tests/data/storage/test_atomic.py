"""Files are written whole or not at all, and what goes wrong is one line that names the file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from stdit_data.errors import DataError, FileError, MissingFileError
from stdit_data.storage import atomic, files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(path: Path, content: dict[str, bytes] | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir()
    for name, data in content.items():
        (path / name).write_bytes(data)


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EBUSY, "Device or resource busy")])
@pytest.mark.parametrize("step", ["put aside", "put in place", "remove"])
def test_a_folder_is_there_wherever_its_replacement_ends(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a", {"old": b"old"})
    rename, rmtree = Path.rename, shutil.rmtree

    def renaming(path: Path, target: Path) -> Path:
        if (step == "put aside" and path.name == "a") or (step == "put in place" and path.suffix == ".part"):
            raise error
        return rename(path, target)

    def removing(path: Path) -> None:
        if step == "remove" and path.suffix == ".old":
            raise error
        rmtree(path)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(shutil, "rmtree", removing)
    with contextlib.suppress(KeyboardInterrupt, FileError), atomic.write_atomically(tmp_path / "a") as partial:
        make(partial, {"new": b"new"})
    monkeypatch.undo()
    there = contents(tmp_path)
    hidden = {name for name in there if name.startswith(".")}
    if step == "remove":
        assert there.keys() - hidden == {"a/new"}
        assert [name.rsplit(".", 1)[1] for name in hidden] == ["old/old"]
    else:
        assert there == {"a/old": b"old"}


def test_the_next_folder_removes_what_killed_processes_left(tmp_path: Path) -> None:
    leftovers = [".a.1.old", ".a.12.part", ".a.13.part"]
    others = [".a.b.1.old", ".a.b.1.part", ".a.x.part", "a.1.old"]
    for name in leftovers + others:
        make(tmp_path / name, {"half": b"half"})
    day = time.time() - 25 * 3600
    for path in tmp_path.rglob("*"):
        if ".13." not in str(path):  # which is being written
            os.utime(path, (day, day))
    with atomic.write_atomically(tmp_path / "a") as partial:
        make(partial, {"new": b"new"})
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.13.part", *others}


def test_processes_with_the_same_number_do_not_share_an_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers
    with atomic.write_atomically(tmp_path / "a") as one:
        one.write_text("one")
        with atomic.write_atomically(tmp_path / "a") as two:
            two.write_text("two")
        assert one != two
        assert contents(tmp_path) == {"a": b"two", one.name: b"one"}
    assert contents(tmp_path) == {"a": b"one"}


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


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_written_by_one_process(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, link = f"{tmp_path}/new/a.bin", os.link

    def late(old: Path, new: Path) -> None:
        if not links:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        Path(new).write_bytes(b"first")  # by another process, after this one has seen that there is none
        link(old, new)

    monkeypatch.setattr(os, "link", late)
    atomic.write_new(url, b"second")
    assert contents(tmp_path) == {"new/a.bin": b"first" if links else b"second"}
    atomic.write_new(url, b"third")
    assert contents(tmp_path) == {"new/a.bin": b"first" if links else b"second"}


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
