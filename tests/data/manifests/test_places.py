"""Manifests in archives and stores, and paths that lead elsewhere."""

from __future__ import annotations

import io
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry, known_implementations
from fsspec.spec import AbstractFileSystem

from stdit_data.errors import ClipError, DataError
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.storage import files
from stdit_data.video.probe import probe


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


def test_unknown_and_missing_protocols() -> None:
    with pytest.raises(DataError, match="Protocol not known: nothing"):
        read_manifest("nothing://a.csv")


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
