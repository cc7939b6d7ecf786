"""Clips whose names are not UTF-8 go through everything that lists, reads, caches or reports them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, manifest_metadata, text_job, video_job
from stdit_data.loading.rejects import Rejects
from stdit_data.manifests.format import read_manifest, write_manifest
from stdit_data.manifests.split import hash_position
from stdit_data.manifests.validate import good_entries, validate
from stdit_data.storage import urls

CLIP, BROKEN, PLAIN = (os.fsdecode(name) for name in (b"caf\xe9.mp4", b"\xff.mp4", b"plain.mp4"))


@pytest.fixture(scope="module")
def folder(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip, a broken one and another whose name is UTF-8, all with captions."""
    folder = tmp_path_factory.mktemp("clips") / os.fsdecode(b"set\xfe")
    folder.mkdir()
    encode_clip(folder / "a.mp4", frames=4)
    (folder / "a.mp4").rename(folder / CLIP)
    encode_clip(folder / PLAIN, frames=5)
    (folder / BROKEN).write_bytes(b"not a video")
    for name in (CLIP, BROKEN, PLAIN):
        (folder / name).with_suffix(".txt").write_text(f"caption of {urls.printable(name)}")
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_validated_reported_and_written(folder: Path, tmp_path: Path, suffix: str) -> None:
    manifest = read_manifest(str(folder))
    report = validate(manifest, workers=1)
    assert [Path(finding.path).name for finding in report.bad] == [BROKEN]
    report.write(str(tmp_path / "report.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in (CLIP, PLAIN, BROKEN)]
    write_manifest(str(tmp_path / f"good{suffix}"), good_entries(manifest, report))
    again = read_manifest(str(tmp_path / f"good{suffix}"))
    assert [entry.path for entry in again.entries] == [str(folder / name) for name in (CLIP, PLAIN)]
    assert validate(again, workers=1).bad == []


def test_trained_on_and_rejected(folder: Path, tmp_path: Path) -> None:
    dataset = open_videos(folder, frames=2, height=16, width=16, interval=1)
    assert dataset.load(0, seed=0, epoch=0).caption == "caption of caf\\xe9.mp4"
    with pytest.raises(ClipError) as caught:
        dataset.load(2, seed=0, epoch=0)
    log = tmp_path / "rejects.jsonl"
    for _ in range(2):  # the second finds the first's line
        rejects = Rejects(log, samples=3, rank=0, max_share=1.0)
        rejects.count([], [(2, caught.value)], epoch=0, step=1)
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == [str(folder / BROKEN)]


def test_rejects_that_cannot_be_listed_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log").write_text("")
    rejects = Rejects(tmp_path / "log" / "rejects.jsonl", samples=3, rank=0, max_share=1.0)  # in a file, not a folder
    rejects.count([], [(2, ClipError("a.mp4", "no video"))], epoch=0, step=1)
    assert "rejected clip 2 is not listed in" in caplog.text


def test_encoded_and_held_out_alike(folder: Path, tmp_path: Path) -> None:
    def moments(video: Tensor) -> Tensor:
        return torch.cat([video[..., ::8, ::8]] * 2, dim=1)

    dataset = open_videos(folder, frames=2, height=16, width=16, interval=1)
    about = manifest_metadata(str(folder), dataset)
    vae = VideoEncoder(moments, lambda b: (3, b.frames, b.height // 8, b.width // 8), {"source": "a", "hash": "a"})
    text = TextEncoder(lambda texts: [torch.zeros(1, 2)] * len(texts), str, 2, 4, {"source": "t", "hash": "t"})
    assert video_job(dataset, str(tmp_path), vae, {}, about).run()
    assert text_job([dataset.caption(index) for index in range(3)], str(tmp_path), text, about).run()
    cached = LatentDataset(str(tmp_path))
    assert cached.path(0) == f"{folder.parent}/set\\xfe/caf\\xe9.mp4"
    for index in range(3):
        assert hash_position(cached.path(index)) == hash_position(dataset.path(index))


@pytest.mark.parametrize("source", ["folder", "set.csv", "set.parquet"])
def test_curated(folder: Path, tmp_path: Path, source: str) -> None:
    pytest.importorskip("cv2")
    from stdit_data.curation.engine import rejects_path, run
    from stdit_data.curation.filtering.filter import open_filter
    from stdit_data.curation.score import ScoreStep
    from stdit_data.curation.tables import open_rows
    from stdit_data.workers.executors import Inline

    url = str(folder)
    if source != "folder":
        url = str(tmp_path / source)
        manifest = read_manifest(str(folder))
        entries = [replace(entry, path=urls.canonical(manifest.locate(entry))) for entry in manifest.entries]
        write_manifest(url, entries)
    scored, kept = str(tmp_path / "scored.parquet"), str(tmp_path / "kept.parquet")
    run(ScoreStep(), open_rows(url), scored, Inline())
    assert [entry.path for entry in read_manifest(scored).entries] == [str(folder / name) for name in (CLIP, PLAIN)]
    assert [json.loads(line)["path"] for line in Path(rejects_path(scored)).read_text().splitlines()] == [
        str(folder / BROKEN)
    ]
    run(open_filter("duration > 0.15", open_rows(scored)), open_rows(scored), kept, Inline())
    assert [entry.path for entry in read_manifest(kept).entries] == [str(folder / PLAIN)]
    (reject,) = Path(rejects_path(kept)).read_text().splitlines()
    assert json.loads(reject)["path"] == str(folder / CLIP)
