"""Read clips from the videos and images of a manifest or a folder.
C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from stdit_data.bucket_column import BucketColumn
from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.errors import DataError
from stdit_data.manifests.arrays import flags
from stdit_data.manifests.entries import Entries
from stdit_data.manifests.format import Manifest, is_list, read_manifest
from stdit_data.manifests.identity import clips_identity
from stdit_data.manifests.metadata import Lengths, choose_buckets, complete_metadata
from stdit_data.storage import files, urls
from stdit_data.transforms import Fit, may_flip, stack_videos, to_float
from stdit_data.video.frames import read_frames
from stdit_data.video.pictures import is_still, open_video, read_image
from stdit_data.video.probe import reads_clip
from stdit_data.video.read import FrameConverter
from stdit_data.video.segments import Sampling, Short, default_sampling

log = logging.getLogger(__name__)


Crop = Literal["center", "random"]


Place = Literal["random", "start", "center"]


T = TypeVar("T")


class Once(Protocol):
    """Calls a function, in one of several processes, and returns its result, in all of them."""

    def __call__(self, compute: Callable[[], T], /) -> T: ...


def _in_this_process(compute: Callable[[], T]) -> T:
    return compute()


DRAWS = 4  # random numbers per sample: start, crop x, crop y, flip


class VideoDataset:
    """A `ClipDataset` over the entries of a manifest; `open_videos` makes one and explains the settings.

    Args:
        manifest: locates the entries' files.
        entries: the entries to read.
        buckets: the bucket of each entry.
        samplings: which frames to read, by bucket.
        crop, flip, place, stream, uint8: see `open_videos`.

    Attributes:
        weights: how often each sample is seen per epoch; None if the manifest has no weights.
        identity: a number that changes with the list of clips, see `ClipDataset`.
    """

    def __init__(
        self,
        manifest: Manifest,
        entries: Entries,
        buckets: BucketColumn,
        samplings: Mapping[Bucket, Sampling],
        *,
        crop: Crop,
        flip: bool,
        place: Place,
        stream: int | None,
        uint8: bool = False,
    ) -> None:
        self.manifest, self.entries, self.bucket_column = manifest, entries, buckets
        self.samplings = dict(samplings)
        self.crop, self.flip, self.place, self.stream, self.uint8 = crop, flip, place, stream, uint8
        weights = entries.numbers("weight")
        self.weights = None if np.isnan(weights).all() else np.where(np.isnan(weights), 1.0, weights)
        self.identity = clips_identity(manifest.folder, entries)

    def __len__(self) -> int:
        return len(self.entries)

    def bucket(self, index: int) -> Bucket:
        """Return the sample's frames, height and width."""
        return self.bucket_column[index]

    def path(self, index: int) -> str:
        """Return the full path or URL of a sample's file."""
        return urls.join(self.manifest.folder, self.entries.value("path", index))

    def paths(self) -> Iterator[str]:
        """Yield the full paths or URLs of all samples."""
        return (urls.join(self.manifest.folder, path) for path in self.entries.paths())

    def groups(self) -> Iterator[str | None] | None:
        """Return the group of each sample, None where the manifest gives none; None if it gives no groups at all."""
        if "group" not in self.entries.table.column_names:
            return None
        return chain.from_iterable(block["group"].to_pylist() for block in self.entries.blocks(["group"]))

    def caption(self, index: int) -> str:
        """Return a sample's caption, without reading its file."""
        return self.entries.value("caption", index) or ""

    def subset(self, indices: Sequence[int], *, plain: bool = False) -> VideoDataset:
        """Select samples.

        Args:
            indices: indices of the samples, in their new order.
            plain: read without randomness: the centre of each video and frame, never flipped.
        """
        return VideoDataset(
            self.manifest,
            self.entries.take(indices),
            self.bucket_column.take(indices),
            self.samplings,
            crop="center" if plain else self.crop,
            flip=self.flip and not plain,
            place="center" if plain else self.place,
            stream=self.stream,
            uint8=self.uint8,
        )

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Read a sample, with start, crop and flip drawn by (seed, epoch, index).

        Raises:
            ClipError: the file is missing, damaged or too short.
            StoreError: its store or disk fails.
        """
        entry, bucket = self.entries[index], self.bucket(index)
        place, x, y, flip = self._draw(seed, epoch, index)
        fit = Fit(bucket.height, bucket.width, x, y, flip=self.flip and flip < 0.5 and may_flip(entry.caption))

        @reads_clip
        def read(url: str) -> Clip:
            with files.open_media(url) as media:
                if is_still(url, media):
                    still = _repeat(fit(read_image(media)), bucket.frames)
                    return Clip(self._pixels(still), entry.caption, index, fps=0.0)
                with open_video(url, media, self.stream) as video:
                    convert = FrameConverter(fit, video)
                    clip = read_frames(video, self.samplings[bucket], convert, place=place, segment=entry.segment)
            span = (clip.times[0], clip.times[-1])
            return Clip(self._pixels(stack_videos(clip.pictures, dim=1)), entry.caption, index, clip.fps, span)

        return read(self.path(index))

    def _pixels(self, video: Tensor) -> Tensor:
        return video if self.uint8 else to_float(video)

    def _draw(self, seed: int, epoch: int, index: int) -> tuple[float, float, float, float]:
        raw = np.random.Philox(np.random.SeedSequence([seed, epoch, index])).random_raw(DRAWS)
        place, x, y, flip = (float(bits >> np.uint64(11)) / 2**53 for bits in raw)  # [0, 1), as numpy makes floats
        if self.place != "random":
            place = 0.0 if self.place == "start" else 0.5
        if self.crop == "center":
            x = y = 0.5
        return place, x, y, flip


def open_videos(
    source: str | Path,
    *,
    frames: int = 16,
    height: int = 256,
    width: int = 256,
    interval: int | None = None,
    fps: float | None = None,
    short: Short = "skip",
    crop: Crop = "center",
    flip: bool = True,
    place: Place = "random",
    buckets: Sequence[Bucket] | None = None,
    stream: int | None = None,
    root: str | None = None,
    confine: bool = False,
    empty_captions: bool = False,
    uint8: bool = False,
    workers: int = 8,
    once: Once = _in_this_process,
) -> VideoDataset:
    """Open a folder or a manifest for training.

    Images are clips of one frame, which is repeated in buckets of more frames, and are never too short. Animated WebP
    and PNG files are videos.

    Args:
        source: folder or manifest, see `manifests.format.read_manifest`.
        frames, height, width: shape of the clips in frames and pixels, if no buckets are given.
        interval: read every n-th source frame. Without it and `fps` Open-Sora 1.0's: 3 up to 16 frames, 2 above.
        fps: read at this frame rate instead, in frames per second.
        short: what to do with videos that are too short: `skip` them, or `hold` their last frame. Skipped videos are
            left out at once if the manifest has their length (num_frames or end, and fps), else rejected when read.
        crop: `center` or `random`.
        flip: mirror half of the clips, but never those whose caption mentions left, right, east, west or clockwise.
        place: where in a video the clip lies: `random`, `start` or `center`.
        buckets: shapes to sort clips into, see `buckets.choose_bucket`. Entries without width, height and (for
            buckets of different lengths) num_frames are probed first; `stdit data validate --write` stores these.
            Clips that can't be probed go to the first bucket and are rejected when read.
        stream: number of the video stream of each file, from 0; by default FFmpeg's choice.
        root: the folder that relative paths start from; by default the manifest's own.
        confine: refuse paths that lead out of this folder.
        empty_captions: train on clips without captions.
        uint8: leave pixels as uint8 in 0..255, a quarter of the memory, for `transforms.to_float` to convert; HDR
            videos are float32 in [-1, 1] either way.
        workers: number of threads that probe.
        once: calls the function that lists a folder with its captions, and the one that probes; of several processes
            that open the same clips, one calls it and hands its result to the others, so that all of them have the
            same clips and choose the same buckets.

    Raises:
        DataError: there are no clips to train on, captions are missing, or a setting is out of range.
    """
    for name, value, allowed in (("crop", crop, ("center", "random")), ("place", place, ("random", "start", "center"))):
        if value not in allowed:
            raise DataError(f"{name} {value!r}: expected {' or '.join(map(repr, allowed))}")
    if buckets is None and min(frames, height, width) < 1:
        raise DataError(f"{frames} frames of {height}x{width}: expected numbers from 1")
    shapes = [Bucket(*bucket) for bucket in buckets] if buckets is not None else [Bucket(frames, height, width)]
    if not shapes:
        raise DataError("buckets: expected at least one, as in 16x256x256")
    samplings = {shape: default_sampling(shape.frames, interval, fps, short) for shape in shapes}
    least = samplings[min(shapes)]

    def read() -> Manifest:
        return read_manifest(str(source), root=root, confine=confine)

    manifest = read() if is_list(str(source)) else once(read)  # all can map the table of a file into memory
    if not empty_captions:
        _check_captions(manifest)
    entries = manifest.entries
    if len(shapes) > 1:
        entries = complete_metadata(
            manifest, stream, workers, lengths=len({shape.frames for shape in shapes}) > 1, once=once
        )
    lengths = Lengths(entries)
    chosen = choose_buckets(entries, lengths, samplings)
    left_out = lengths.short(least) if short == "skip" else np.zeros(len(entries), bool)
    if left_out.all():
        need = math.ceil(least.span(entries[0].fps or 30))
        raise DataError(
            f"{source}: all {len(entries)} clips are too short, {need} source frames are needed; use fewer frames, a "
            "smaller interval, or short='hold' (`--set data.short=hold`)"
        )
    if left_out.any():
        log.warning("%s: %d of %d clips left out, too short", source, left_out.sum(), len(entries))
        kept = np.flatnonzero(~left_out)
        entries, chosen = entries.take(kept), chosen.take(kept)
    if len(shapes) > 1:
        shares = ", ".join(f"{bucket}: {count}" for bucket, count in chosen.counts().items())
        log.info("%s: clips per bucket %s", source, shares)
    return VideoDataset(
        manifest,
        entries,
        chosen,
        samplings,
        crop=crop,
        flip=flip,
        place=place,
        stream=stream,
        uint8=uint8,
    )


def _repeat(picture: Tensor, frames: int) -> Tensor:
    return picture[:, None].repeat(1, frames, 1, 1)


def _check_captions(manifest: Manifest) -> None:
    entries, empty, first = manifest.entries, 0, 0
    start = 0
    for block in entries.blocks(["path", "caption"]):
        missing = np.ones(len(block), bool)
        if "caption" in block.schema.names:
            missing = flags(block["caption"].is_null())
        if not empty and missing.any():
            first = start + int(missing.argmax())
        empty, start = empty + int(missing.sum()), start + len(block)
    if not empty:
        return
    if manifest.url == manifest.folder:
        where = "put each video's caption beside it, as name.txt beside name.mp4"
    else:
        where = "fill in column 'caption'"
    raise DataError(
        f"{manifest.url}: {empty} of {len(entries)} clips have no caption, the first {entries[first].path}; "
        f"{where}, or train without captions: empty_captions=True (`--set data.empty_captions=true`)"
    )
