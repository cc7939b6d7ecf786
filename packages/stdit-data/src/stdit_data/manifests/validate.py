"""Checks a manifest before a run: every entry's file, caption and facts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import torch

from stdit_data import files
from stdit_data.clip import ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.manifests.format import Entry, Manifest
from stdit_data.manifests.metadata import with_metadata
from stdit_data.video.frames import Sampling, read_frames
from stdit_data.video.probe import Probe, probe, reading
from stdit_data.video.stream import VideoStream

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(slots=True)
class Finding:
    """What was found of one entry."""

    index: int
    path: str
    caption: str
    facts: Probe | None = None  # None where the file can't be read
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What was found of all entries."""

    source: str
    findings: list[Finding]

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problems]

    def summary(self) -> dict[str, str]:
        """Name to value, ready to be shown."""
        facts = [finding.facts for finding in self.findings if finding.facts is not None]
        videos = [fact for fact in facts if fact.fps]
        rows = {
            "entries": str(len(self.findings)),
            "videos, images": f"{len(videos)}, {len(facts) - len(videos)}",
            "entries with problems": str(len(self.bad)),
        }
        if videos:
            seconds = [fact.duration for fact in videos]
            rows |= {
                "duration": f"{sum(seconds):.1f} s in all, {_range(seconds, '.2f')} s each",
                "frames": _range([fact.frames for fact in videos], "d"),
                "frames per second": _range([fact.fps for fact in videos], ".2f"),
            }
        if facts:
            rows |= {
                "sizes": _most(f"{fact.width}x{fact.height}" for fact in facts),
                "codecs": _most(fact.codec for fact in facts),
                "pixel formats": _most(fact.pixel_format for fact in facts if fact.pixel_format),
            }
        if hdr := sum(fact.hdr for fact in facts):
            rows["HDR"] = f"{hdr}, tone-mapped when read"
        if interlaced := sum(fact.interlaced for fact in facts):
            rows["interlaced"] = f"{interlaced}, one field is read: half of the lines"
        if several := sum(fact.streams > 1 for fact in facts):
            rows["several video streams"] = f"{several}, the best is used"
        return {name: value for name, value in rows.items() if value}

    def write(self, url: str) -> None:
        """All findings as JSON lines."""
        with files.open_write(url) as file:
            for finding in self.findings:
                file.write((json.dumps(asdict(finding), ensure_ascii=False) + "\n").encode())


def validate(
    manifest: Manifest,
    *,
    sampling: Sampling | None = None,
    stream: int | None = None,
    thorough: bool = False,
    workers: int = 8,
    progress: Progress | None = None,
) -> Report:
    """Probes every entry, in threads.

    Each file is opened, its first and its last frame are decoded (which finds truncated files), and what the manifest
    says of it is compared. Missing captions, entries that occur twice, and files of equal content are problems too.

    Args:
        manifest: the entries.
        sampling: with it, clips too short for it are problems.
        stream: which video stream of each file.
        thorough: decode every frame, and compare checksums where the manifest has them.
        workers: threads.
        progress: called after each entry.
    """
    total = len(manifest.entries)
    findings: list[Finding] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = _ahead(
            pool,
            (lambda index: _check(manifest, index, sampling, stream, thorough)),
            range(total),
            ahead=4 * max(1, workers),
        )
        for finding in jobs:
            findings.append(finding)
            if progress is not None:
                progress(len(findings), total)
    _find_repeats(manifest, findings)
    _find_copies(manifest, findings)
    return Report(manifest.url, findings)


def good_entries(manifest: Manifest, report: Report) -> list[Entry]:
    """The entries without problems, with full paths and with fps, width, height and num_frames filled in."""
    good = [finding for finding in report.findings if not finding.problems and finding.facts is not None]
    return [
        replace(with_metadata(manifest.entries[f.index], f.facts), path=files.canonical(f.path))
        for f in good
        if f.facts is not None
    ]


def check_dataset(dataset: ClipDataset, *, samples: int = 64, progress: Progress | None = None) -> Report:
    """Loads evenly spaced samples of any dataset and checks what the loader relies on: shape, range, a caption, and
    the same clip again for the same (seed, epoch, index)."""
    total = min(samples, len(dataset))
    findings = []
    for done in range(total):
        index = done * len(dataset) // total
        finding = Finding(index, f"sample {index}", "")
        findings.append(finding)
        try:
            clip, again = dataset.load(index, seed=0, epoch=0), dataset.load(index, seed=0, epoch=0)
        except ClipError as error:
            finding.path, finding.problems = error.path, [error.reason]
            continue
        frames, height, width = clip.video.shape[1:]
        duration = frames / clip.fps if clip.fps else 0.0
        finding.caption = clip.caption
        finding.facts = Probe(type(dataset).__name__, width, height, frames, clip.fps, duration)
        if not clip.caption:
            finding.problems.append("no caption")
        if tuple(clip.video.shape[1:]) != tuple(dataset.bucket(index)):
            finding.problems.append(f"shape {tuple(clip.video.shape)}, announced {dataset.bucket(index)}")
        if clip.video.dtype != torch.float32 or not -1 <= float(clip.video.min()) <= float(clip.video.max()) <= 1:
            finding.problems.append(
                f"{clip.video.dtype} in {clip.video.min():g} to {clip.video.max():g}, expected float32 in -1 to 1"
            )
        if not torch.equal(clip.video, again.video) or clip.caption != again.caption:
            finding.problems.append("another clip when loaded again with the same seed, epoch and index")
        if progress is not None:
            progress(done + 1, total)
    return Report(type(dataset).__name__, findings)


def _check(manifest: Manifest, index: int, sampling: Sampling | None, stream: int | None, thorough: bool) -> Finding:
    entry = manifest.entries[index]
    url = files.canonical(manifest.locate(entry))
    finding = Finding(index, url, entry.caption)
    if not entry.caption:
        beside = PurePosixPath(entry.path).with_suffix(".txt").name
        where = f"put it in {beside} beside the file" if manifest.url == manifest.folder else "column caption is empty"
        finding.problems.append(f"no caption ({where})")
    try:
        finding.facts = probe(url, stream=stream)
        if not files.is_image(url):
            _check_frames(url, entry, sampling, stream, thorough)
        if thorough and entry.sha256 and sha256(url) != entry.sha256.lower():
            finding.problems.append("sha256 differs from the manifest's")
    except ClipError as error:
        finding.problems.append(error.reason)
    except DataError as error:  # a URL that can't be resolved at all
        finding.problems.append(str(error))
    if finding.facts is not None:
        finding.problems += _differences(entry, finding.facts)
    return finding


def _check_frames(url: str, entry: Entry, sampling: Sampling | None, stream: int | None, thorough: bool) -> None:
    with reading(url), files.open_media(url) as media, VideoStream(media, stream) as video:
        nothing = torch.zeros(0)
        read_frames(video, Sampling(1, interval=1), lambda _: nothing, place=1.0, cut=entry.cut)
        if sampling is not None:
            read_frames(video, sampling, lambda _: nothing, place=1.0, cut=entry.cut)
        if thorough:
            for tick, frame in video.all_frames():
                if frame.is_corrupt:
                    raise DataError(f"damaged at {video.seconds(tick):.3f} s")


def _differences(entry: Entry, facts: Probe) -> Iterator[str]:
    for name, stated, found in (
        ("width", entry.width, facts.width),
        ("height", entry.height, facts.height),
        ("num_frames", entry.num_frames, facts.frames),
        ("fps", entry.fps, facts.fps),
    ):
        near = 0.01 * found if name in ("fps", "num_frames") else 0  # rates are rounded, counts may be reckoned
        if stated is not None and found and abs(stated - found) > near:
            yield f"{name} is {found:g}, the manifest says {stated:g}"


def _find_repeats(manifest: Manifest, findings: Sequence[Finding]) -> None:
    first: dict[tuple[str, Any], int] = {}
    for finding in findings:
        key = (finding.path, manifest.entries[finding.index].cut)
        if key in first:
            finding.problems.append(f"the same as entry {first[key]}")
        first.setdefault(key, finding.index)


def _find_copies(manifest: Manifest, findings: Sequence[Finding]) -> None:
    """Files of equal size are compared by checksum: the manifest's where it has one."""
    stated = {f.path: manifest.entries[f.index].sha256 for f in findings}
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(finding.path for finding in findings if finding.facts is not None):
        sizes[files.size(path)].append(path)
    first: dict[str, str] = {}
    copies: dict[str, str] = {}
    for paths in sizes.values():
        for path in paths if len(paths) > 1 else ():
            digest = (stated[path] or sha256(path)).lower()
            if digest in first:
                copies[path] = first[digest]
            first.setdefault(digest, path)
    for finding in findings:
        if finding.path in copies:
            finding.problems.append(f"the same content as {copies[finding.path]}")


def sha256(url: str) -> str:
    """A file's SHA-256, in hexadecimal."""
    with files.open_binary(url) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Finding], items: Iterable[int], *, ahead: int
) -> Iterator[Finding]:
    """As `pool.map`, with no more than `ahead` jobs waiting: a manifest may have millions of entries."""
    rest = iter(items)
    jobs = [pool.submit(work, item) for item in islice(rest, ahead)]
    while jobs:
        yield jobs.pop(0).result()
        jobs += [pool.submit(work, item) for item in islice(rest, 1)]


def _range(values: Sequence[float], spec: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{spec}}" if low == high else f"{low:{spec}} to {high:{spec}}"


def _most(values: Iterable[str]) -> str:
    counted = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count})" for value, count in counted[:6])
    return shown + (f" and {len(counted) - 6} more" if len(counted) > 6 else "")
