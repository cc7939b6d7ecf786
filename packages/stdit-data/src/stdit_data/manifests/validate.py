"""Check a manifest or a data set before a run: every entry's file, caption and metadata."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, cast

import torch

from stdit_data.clip import ClipDataset
from stdit_data.errors import ClipError, DataError, StoreError
from stdit_data.manifests.format import Entry, Manifest
from stdit_data.manifests.metadata import with_metadata
from stdit_data.storage import atomic, files, readers, urls
from stdit_data.video.frames import read_frames
from stdit_data.video.pictures import open_video
from stdit_data.video.probe import Probe, probe, reads_clip
from stdit_data.video.segments import Sampling
from stdit_data.video.verify import check_against_decode

Progress = Callable[[int, int], None]  # entries done, entries in total


@dataclass(slots=True)
class Finding:
    """The result of checking one entry."""

    index: int
    path: str
    caption: str
    metadata: Probe | None = None  # of the whole file; None if it can't be read
    frames: int = 0  # of the clip: of its segment
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """The results of checking all entries."""

    source: str
    findings: list[Finding]

    @property
    def bad(self) -> list[Finding]:
        """The entries with problems."""
        return [finding for finding in self.findings if finding.problems]

    def summary(self) -> dict[str, str]:
        """Summarise counts, durations, sizes and codecs, as names and values for display."""
        probes = [finding.metadata for finding in self.findings if finding.metadata is not None]
        videos = [(probe, found.frames) for found in self.findings if (probe := found.metadata) and probe.fps]
        rows = {
            "entries": str(len(self.findings)),
            "videos, images": f"{len(videos)}, {len(probes) - len(videos)}",
            "entries with problems": str(len(self.bad)),
        }
        if videos:
            seconds = [probe.duration * frames / max(probe.frames, 1) for probe, frames in videos]
            rows |= {
                "duration": f"{sum(seconds):.1f} s in all, {_range(seconds, '.2f')} s each",
                "frames": _range([frames for _, frames in videos], "d"),
                "frames per second": _range([probe.fps for probe, _ in videos], ".2f"),
            }
        if probes:
            rows |= {
                "sizes": _most(f"{probe.width}x{probe.height}" for probe in probes),
                "codecs": _most(probe.codec for probe in probes),
                "pixel formats": _most(probe.pixel_format for probe in probes if probe.pixel_format),
            }
        if hdr := sum(probe.hdr for probe in probes):
            rows["HDR"] = f"{hdr}, tone-mapped when read"
        if interlaced := sum(probe.interlaced for probe in probes):
            rows["interlaced"] = f"{interlaced}, one field is read: half the vertical resolution"
        if several := sum(probe.streams > 1 for probe in probes):
            rows["several video streams"] = f"{several}, FFmpeg's choice is used"
        return {name: value for name, value in rows.items() if value}

    def write(self, url: str) -> None:
        """Write all findings as JSON lines, an entry's metadata under the key `facts`.

        Raises:
            FileError: the file can't be written.
        """
        with atomic.open_write(url) as file:
            for finding in self.findings:
                row = {"facts" if key == "metadata" else key: value for key, value in asdict(finding).items()}
                file.write(files.json_line(row))


def validate(
    manifest: Manifest,
    *,
    sampling: Sampling | None = None,
    stream: int | None = None,
    thorough: bool = False,
    workers: int = 8,
    progress: Progress | None = None,
) -> Report:
    """Check every entry of a manifest, in threads.

    Each file is opened, its first and last frame are decoded (which finds truncated files), and its metadata is
    compared with the manifest's. Missing captions, duplicate entries and files of equal content are problems too.

    Args:
        manifest: the manifest to check.
        sampling: also report clips that are too short for it.
        stream: number of the video stream of each file, from 0; None for FFmpeg's choice.
        thorough: decode every frame, compare the number of frames and those read after seeks with it, and compare
            checksums where the manifest has them.
        workers: number of threads.
        progress: called after each entry.

    Raises:
        StoreError: a store does not answer, so that its clips can be called neither good nor bad.
    """
    total = len(manifest.entries)
    findings: list[Finding] = []
    for finding in readers.map_in_threads(
        lambda index: _check(manifest, index, sampling, stream, thorough), range(total), workers
    ):
        findings.append(finding)
        if progress is not None:
            progress(len(findings), total)
    _find_repeats(manifest, findings)
    _find_copies(manifest, findings, workers)
    return Report(manifest.url, findings)


def good_entries(manifest: Manifest, report: Report) -> list[Entry]:
    """Return the entries without problems, with full paths and with fps, width, height and num_frames filled in."""
    good = [finding for finding in report.findings if not finding.problems and finding.metadata is not None]
    return [
        replace(with_metadata(manifest.entries[f.index], f.metadata), path=urls.canonical(f.path))
        for f in good
        if f.metadata is not None
    ]


def check_dataset(dataset: ClipDataset, *, samples: int = 64, progress: Progress | None = None) -> Report:
    """Load evenly spaced samples of a data set and check what the loader relies on.

    These are shape, range, a caption, and an equal clip for an equal (seed, epoch, index).

    Args:
        dataset: the data set to check.
        samples: number of samples to load.
        progress: called after each sample.
    """
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
        finding.metadata = Probe(type(dataset).__name__, width, height, frames, clip.fps, duration)
        finding.frames = frames
        if not clip.caption:
            finding.problems.append("no caption")
        if tuple(clip.video.shape[1:]) != tuple(dataset.bucket(index)):
            finding.problems.append(f"shape {tuple(clip.video.shape)}, expected {dataset.bucket(index)} by `bucket`")
        if clip.video.dtype != torch.float32 or not -1 <= float(clip.video.min()) <= float(clip.video.max()) <= 1:
            finding.problems.append(
                f"{clip.video.dtype} in {clip.video.min():g} to {clip.video.max():g}, expected float32 in -1 to 1"
            )
        if not torch.equal(clip.video, again.video) or clip.caption != again.caption:
            finding.problems.append("loading again with the same seed, epoch and index gives another clip")
        if progress is not None:
            progress(done + 1, total)
    return Report(type(dataset).__name__, findings)


def sha256(url: str) -> str:
    """Return the SHA-256 of a file or URL, in hexadecimal."""

    def digest() -> str:
        with files.open_binary(url) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    return files.patiently(url, digest)


def _check(manifest: Manifest, index: int, sampling: Sampling | None, stream: int | None, thorough: bool) -> Finding:
    entry = manifest.entries[index]
    url = urls.canonical(manifest.locate(entry))
    finding = Finding(index, url, entry.caption)
    if not entry.caption:
        where = "column 'caption' is empty"
        if manifest.url == manifest.folder:
            where = f"put it in {PurePosixPath(entry.path).with_suffix('.txt').name} beside the file"
        finding.problems.append(f"no caption ({where})")
    try:
        finding.metadata = probe(url, stream=stream)
        if finding.metadata.fps:
            finding.frames = entry.segment.frames(finding.metadata.fps, finding.metadata.frames)
            _check_frames(url, entry, sampling, stream, thorough)
        if thorough and entry.sha256 and sha256(url) != entry.sha256.lower():
            finding.problems.append("sha256 differs from the manifest's")
    except ClipError as error:
        finding.problems.append(error.reason)
    except StoreError:
        raise
    except DataError as error:  # a URL that can't be resolved at all
        finding.problems.append(str(error))
    if finding.metadata is not None:
        finding.problems += _differences(entry, finding.metadata)
    return finding


@reads_clip
def _check_frames(url: str, entry: Entry, sampling: Sampling | None, stream: int | None, thorough: bool) -> None:
    with files.open_media(url) as media, open_video(url, media, stream) as video:
        nothing = torch.zeros(0)
        read_frames(video, Sampling(1, interval=1), lambda _: nothing, place=1.0, segment=entry.segment)
        if sampling is not None:
            read_frames(video, sampling, lambda _: nothing, place=1.0, segment=entry.segment)
        if thorough:
            check_against_decode(video)


def _differences(entry: Entry, metadata: Probe) -> Iterator[str]:
    for name, stated, found in (
        ("width", entry.width, metadata.width),
        ("height", entry.height, metadata.height),
        ("num_frames", entry.num_frames, metadata.frames),
        ("fps", entry.fps, metadata.fps),
    ):
        tolerance = 0.01 * found if name in ("fps", "num_frames") else 0  # rates are rounded, counts may be estimated
        if stated is not None and found and abs(stated - found) > tolerance:
            yield f"{name} is {found:g}, the manifest says {stated:g}"


def _find_repeats(manifest: Manifest, findings: Sequence[Finding]) -> None:
    first: dict[tuple[str, Any], int] = {}
    for finding in findings:
        key = (finding.path, manifest.entries[finding.index].segment)
        if key in first:
            finding.problems.append(f"a duplicate of entry {first[key]}")
        first.setdefault(key, finding.index)


def _find_copies(manifest: Manifest, findings: Sequence[Finding], workers: int) -> None:
    """Compare files of equal size by checksum, the manifest's where it has one."""
    stated = {f.path: manifest.entries[f.index].sha256 for f in findings}
    sizes: dict[int, list[str]] = defaultdict(list)
    readable = list(dict.fromkeys(finding.path for finding in findings if finding.metadata is not None))
    for path, size in zip(readable, readers.map_in_threads(files.size, readable, workers), strict=True):
        sizes[size].append(path)
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


def _range(values: Sequence[float], spec: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{spec}}" if low == high else f"{low:{spec}} to {high:{spec}}"


def _most(values: Iterable[str]) -> str:
    counted = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count})" for value, count in counted[:6])
    return shown + (f" and {len(counted) - 6} more" if len(counted) > 6 else "")
