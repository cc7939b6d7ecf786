"""Paths and URLs, taken apart and put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit_data.storage import urls


@pytest.mark.parametrize(
    ("url", "layers"),
    [
        ("/data/a::b.mp4", ["/data/a::b.mp4"]),
        ("a::b.mp4", ["a::b.mp4"]),
        ("file:///data/a::b.mp4", ["file:///data/a::b.mp4"]),
        ("zip://in/a.mp4::/data/x::y.zip", ["zip://in/a.mp4", "/data/x::y.zip"]),
        ("zip://a.mp4::s3://bucket/set.zip", ["zip://a.mp4", "s3://bucket/set.zip"]),
        ("zip://::memory://set.zip", ["zip://", "memory://set.zip"]),
        ("simplecache::s3://bucket/a.mp4", ["simplecache", "s3://bucket/a.mp4"]),
        ("zip", ["zip"]),
    ],
)
def test_two_colons_are_part_of_a_local_name(url: str, layers: list[str]) -> None:
    assert urls.layers(url) == layers
    local = len(layers) == 1 and "zip://" not in url
    assert urls.is_local(url) == local


def test_suffixes_of_urls() -> None:
    assert urls.suffix("zip://a/b.MP4::/x/set.zip") == ".mp4"
    assert urls.suffix("https://host/a.csv?key=1.2#part") == ".csv"
    assert urls.suffix("/odd/what?.mp4") == ".mp4"
    assert urls.is_image("s3://bucket/a.JPG")


def test_paths_that_lead_out_of_an_archive_or_a_host() -> None:
    for path in ("../b.mp4", "%2e%2e/b.mp4", "a/%2E./b.mp4", "/b.mp4", "s3://b/b.mp4"):
        assert urls.leads_out("https://host/set", path)
    assert not urls.leads_out("https://host/set", "a/b%20c.mp4")
    assert not urls.leads_out("zip://in::/x.zip", "a/b.mp4")
    assert urls.leads_out("zip://in::/x.zip", "../b.mp4")


def test_the_home_folder_and_one_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert urls.canonical("~/a.mp4") == str(tmp_path / "home" / "a.mp4")
    assert urls.canonical("./~/a.mp4") == str(tmp_path / "~" / "a.mp4")
