"""Files are found and read by the names that they have."""

from __future__ import annotations

import json
import os
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import SEEK_END, BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdit_data.errors import ClipError, MissingFileError
from stdit_data.storage import atomic, files, listing, urls
from stdit_data.video.probe import probe


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


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
def test_files_of_a_tar_are_read_by_many_threads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leisurely(BytesIO):
        def seek(self, *place: int) -> int:
            found = super().seek(*place)
            time.sleep(0.001)  # in which other threads go on
            return found

    monkeypatch.setattr(files, "BytesIO", Leisurely)
    wanted = {f"{i}.bin": bytes([i]) * 30_000 for i in range(8)}
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz" if name.endswith("gz") else "w") as tar:
        for member, data in wanted.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    url = f"memory://{tmp_path.name}/{name}"
    atomic.write_bytes(url, archive.getvalue())

    def read(member: str) -> bytes:
        with files.open_binary(f"tar://{member}::{url}") as file:
            parts = list(iter(lambda: file.read(10_000), b""))
            assert (file.seek(-1, SEEK_END), file.tell()) == (29_999, 29_999)
            return b"".join(parts)[:-1] + file.read()

    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(wanted, pool.map(read, wanted), strict=True)) == wanted
    files.copy(f"tar://3.bin::{url}", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == wanted["3.bin"]


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
