"""Measure reading video: seeking to the frames of a clip against decoding the whole file, and memory over many clips.
Measure opening manifests of many rows.

    uv run python benchmarks/data.py seek [CLIP ...]
    uv run python benchmarks/data.py memory [--clips 20000]
    uv run python benchmarks/data.py manifests [--rows 10000 100000 1000000] [--formats csv jsonl parquet]

They make the clips and manifests they need; `seek` also takes files. Prints Markdown.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import torch

from stdit_data.buckets import Bucket
from stdit_data.datasets.videos import open_videos
from stdit_data.loading.loader import ClipLoader
from stdit_data.manifests.format import read_manifest
from stdit_data.manifests.split import split
from stdit_data.video.frames import read_frames
from stdit_data.video.probe import probe
from stdit_data.video.segments import Sampling
from stdit_data.video.stream import VideoStream

SAMPLING = Sampling(16, interval=3)  # Open-Sora 1.0's first stage


def encode(path: Path, frames: int, size: tuple[int, int], options: dict[str, str]) -> None:
    """A moving texture with some noise, so that frames cost what frames cost."""
    noise = np.random.default_rng(0).integers(0, 40, (2 * size[1], 2 * size[0], 3), dtype=np.uint8)
    y, x = np.mgrid[: 2 * size[1], : 2 * size[0]]
    texture = (128 + 70 * np.sin(x / 23) * np.cos(y / 17))[..., None].astype(np.uint8) + noise
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            top, left = number % size[1], 2 * number % size[0]
            picture = np.ascontiguousarray(texture[top : top + size[1], left : left + size[0]])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def rgb(frame: av.VideoFrame) -> torch.Tensor:
    """Convert a decoded frame to RGB, [H, W, 3] in uint8."""
    return torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))


def seeking(path: str) -> list[torch.Tensor]:
    """16 frames from the middle, as the loader reads them."""
    with VideoStream(path) as video:
        return read_frames(video, SAMPLING, rgb, place=0.5).pictures


def whole(path: str) -> list[torch.Tensor]:
    """The same frames by decoding the file from its start to its end; only the frames kept become RGB."""
    with VideoStream(path) as video:
        first = int(0.5 * (video.count() - SAMPLING.span(video.rate) + 1))
        wanted = set(range(first, first + 3 * 16, 3))
        return [rgb(frame) for number, (_, frame) in enumerate(video.all_frames()) if number in wanted]


def whole_to_rgb(path: str) -> list[torch.Tensor]:
    """As readers do that return a whole video: every frame to RGB, then an index. Kept as uint8."""
    with VideoStream(path) as video:
        first = int(0.5 * (video.count() - SAMPLING.span(video.rate) + 1))
        frames = [rgb(frame) for _, frame in video.all_frames()]
        return frames[first : first + 3 * 16 : 3]


def bound(path: str) -> float:
    """The most that seeking can win: all frames over those from the key frame before the first wanted to the last."""
    with VideoStream(path) as video:
        first = int(0.5 * (video.count() - SAMPLING.span(video.rate) + 1))
        stamps = video.timestamps()
    with av.open(path) as container:
        best = container.streams.best("video")
        keys = [packet.pts for packet in container.demux(best) if packet.is_keyframe and packet.pts is not None]
    key = max(tick for tick in keys if tick <= stamps[first])
    return len(stamps) / (first + int(SAMPLING.span(1)) - stamps.index(key))


def seek(files: list[str], rounds: int, frames: int) -> None:
    """Ways in turn, so that a busy moment meets all; medians of CPU time, which other load doesn't change much."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"made, {frames / 30:.0f} s.mp4"
        encode(made, frames, (640, 360), {"preset": "medium"})
        print(f"{platform.processor() or platform.machine()}, PyAV {av.__version__}, one thread\n")
        print(
            "| clip | seek, ms | decode whole, ms | whole to RGB, ms | whole / seek | at most | whole to RGB / seek |"
        )
        print("|---|---|---|---|---|---|---|")
        for path in [str(made), *files]:
            facts = probe(path)
            ways: list[Callable[[str], list[torch.Tensor]]] = [seeking, whole, whole_to_rgb]
            results = [way(path) for way in ways]
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), path
            times: list[list[float]] = [[], [], []]
            for _ in range(rounds):
                for way, spent in zip(ways, times, strict=True):
                    started = time.process_time()
                    way(path)
                    spent.append(1000 * (time.process_time() - started))
            a, b, c = (statistics.median(spent) for spent in times)
            name = f"{Path(path).name}, {facts.width}x{facts.height}, {facts.frames} frames"
            print(
                f"| {name} | {a:.0f} | {b:.0f} | {c:.0f} | {b / a:.1f} | {bound(path):.1f} | {c / a:.1f} |", flush=True
            )


def resident() -> float:
    """Resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(clips: int) -> None:
    """Resident memory while the loader reads; with bad files among the good ones, and random crops."""
    batch = 20
    with tempfile.TemporaryDirectory() as folder:
        for number in range(24):
            path = Path(folder) / f"{number}.mp4"
            encode(path, 24, (96 + 8 * (number % 3), 64), {"preset": "veryfast", "g": "12"})
            path.with_suffix(".txt").write_text(f"clip {number}")
        (Path(folder) / "broken.mp4").write_bytes((Path(folder) / "0.mp4").read_bytes()[:2000])
        (Path(folder) / "broken.txt").write_text("broken")
        dataset = open_videos(folder, frames=4, height=48, width=48, crop="random")
        loader = ClipLoader(
            dataset, global_batch=batch, seed=0, workers=2, rejects=Path(folder) / "rejects.jsonl", max_reject_share=0.2
        )
        print("| clips read | resident, MiB |\n|---|---|")
        early, late, first = 0.0, 0.0, min(1000, clips // batch * batch)
        started, repeats = time.perf_counter(), 0
        for step, batches in enumerate(islice(loader, clips // batch), 1):
            repeats += sum(micro.repeats for micro in batches)
            done = step * batch
            if done == first or done % max(1000, clips // 10) == 0:
                gc.collect()
                late = resident()
                early = early or late
                print(f"| {done} | {late:.1f} |", flush=True)
        loader.close()
        grown = 100 * (late / early - 1)
        print(f"\nAfter {clips} clips: {grown:+.1f} % of after {first}; {repeats} repeats for a bad file.")
        print(f"{clips / (time.perf_counter() - started):.0f} clips a second.")


COLUMNS = ("path", "caption", "start_frame", "end_frame", "fps", "width", "height", "num_frames")
WORDS = [
    "a",
    "small",
    "dog",
    "runs",
    "along",
    "the",
    "wet",
    "beach",
    "while",
    "two",
    "people",
    "with",
    "red",
    "umbrellas",
    "watch",
    "it",
    "from",
    "an",
    "old",
    "wooden",
    "pier",
]


def tables(rows: int) -> Iterator[pa.Table]:
    """Rows of a manifest: five cuts of each video, two sizes, captions of about 110 characters, half with commas."""
    draw = np.random.default_rng(0)
    words = np.array(WORDS)
    for first in range(0, rows, 50_000):
        row = np.arange(first, min(first + 50_000, rows))
        start = 150 * (row % 5)
        texts = [f"{number}:" for number in row], *words[draw.integers(0, len(WORDS), (13, len(row)))].tolist()
        captions = [
            f"{' '.join(text[:6])}{',' * (text[0][-2] in '13579')} {' '.join(text[6:])}."
            for text in zip(*texts, strict=True)
        ]
        paths = [f"part{number // 50_000}/{number // 5:010x}.mp4" for number in row.tolist()]
        width, fps = np.where(row % 3, 1280, 720), np.full(len(row), 29.97)
        sizes = [width, np.full(len(row), 720), np.full(len(row), 900)]
        yield pa.table([paths, captions, start, start + 120, fps, *sizes], names=list(COLUMNS))


def write_rows(path: Path, rows: int) -> None:
    """Write a manifest of made-up rows."""
    schema = next(tables(1)).schema
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for table in tables(rows):
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        return
    with pc.CSVWriter(path, schema) if path.suffix == ".csv" else pq.ParquetWriter(path, schema) as writer:
        for table in tables(rows):
            writer.write_table(table)


def open_rows(path: str) -> None:
    """Open a manifest in this process, and print CPU seconds and MB of each step as JSON."""
    np.argsort(np.random.Philox(0).random_raw(10))  # loaded beforehand
    found: dict[str, float] = {}
    before = memory_of_own(), resident()

    def timed(name: str, work: Callable[[], object]) -> object:
        started = time.process_time()
        result = work()
        found[name] = round(time.process_time() - started, 4)
        return result

    timed("read", lambda: read_manifest(path))
    buckets = [Bucket(16, 256, 256), Bucket(16, 256, 448), Bucket(32, 256, 256)]
    dataset = timed("open", lambda: open_videos(path, buckets=buckets))
    loader = timed("loader", lambda: ClipLoader(dataset, global_batch=512, seed=0))
    first = timed("first batch", lambda: loader.order.batch(0, 0))
    found["100 batches"] = 0.0
    timed("100 batches", lambda: [loader.order.batch(0, number) for number in range(min(100, loader.order.batches(0)))])
    timed("epoch 57", lambda: loader.order.batch(57, 0))
    state = loader.state_dict()
    timed("resume", lambda: loader.load_state_dict(state))
    gc.collect()
    found["own MB"], found["MB"] = round(memory_of_own() - before[0]), round(resident() - before[1])
    found["peak MB"] = round(memory_of_own("VmHWM") - before[1])
    timed("split", lambda: split(dataset.paths(), 0.01))
    found["identity"], found["fingerprint"] = dataset.identity, loader.order.fingerprint()
    found["first"] = sum(slot.sample for slot in first.slots)
    print(json.dumps(found))


def manifests(rows: list[int], formats: list[str]) -> None:
    """Open generated manifests, each in processes of its own: for the first time, and again."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for count in rows:
            for kind in formats:
                path = Path(folder) / f"{count}.{kind}"
                write_rows(path, count)
                for which in ("first", "again"):
                    command = [sys.executable, __file__, "open", str(path)]
                    environment = {**os.environ, "XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                    print(count, kind, which, f"{path.stat().st_size / 1e6:.0f} MB", done.stdout.strip(), flush=True)
                path.unlink()


def memory_of_own(name: str = "RssAnon") -> float:
    """Memory of this process that it shares with no file, in MiB (Linux); `VmHWM`: its peak, with files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run the command that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("seek")
    one.add_argument("files", nargs="*")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--frames", type=int, default=1800, help="of the clip that is made, 30 a second")
    two = commands.add_parser("memory")
    two.add_argument("--clips", type=int, default=20_000)
    three = commands.add_parser("manifests")
    three.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    three.add_argument("--formats", nargs="+", default=["csv", "jsonl", "parquet"])
    commands.add_parser("open").add_argument("path")
    args = parser.parse_args()
    if args.command == "seek":
        seek(args.files, args.rounds, args.frames)
    elif args.command == "memory":
        memory(args.clips)
    elif args.command == "manifests":
        manifests(args.rows, args.formats)
    else:
        open_rows(args.path)


if __name__ == "__main__":
    main()
