"""Measure reading video: seeking to the frames of a clip against decoding the whole file, and memory over many clips.

    uv run python benchmarks/data.py seek [CLIP ...]
    uv run python benchmarks/data.py memory [--clips 20000]

Both encode the clips they need; `seek` also takes files. Prints Markdown.
"""

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from stdit_data.datasets.videos import open_videos
from stdit_data.loading.loader import ClipLoader
from stdit_data.video.frames import Sampling, read_frames
from stdit_data.video.probe import probe
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


def seek(files: list[str], rounds: int) -> None:
    """Ways in turn, so that a busy moment meets all; medians of CPU time, which other load doesn't change much."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made, 60 s.mp4"
        encode(made, 1800, (640, 360), {"preset": "medium"})
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
        early = late = 0.0
        started, repeats = time.perf_counter(), 0
        for step, batches in enumerate(islice(loader, clips // batch), 1):
            repeats += sum(micro.repeats for micro in batches)
            done = step * batch
            if done == 1000 or done % max(1000, clips // 10) == 0:
                gc.collect()
                late = resident()
                early = early or late
                print(f"| {done} | {late:.1f} |", flush=True)
        loader.close()
        print(
            f"\nAfter {clips} clips: {100 * (late / early - 1):+.1f} % of after 1000; {repeats} repeats for a bad file."
        )
        print(f"{clips / (time.perf_counter() - started):.0f} clips a second.")


def main() -> None:
    """Run the command that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("seek")
    one.add_argument("files", nargs="*")
    one.add_argument("--rounds", type=int, default=5)
    two = commands.add_parser("memory")
    two.add_argument("--clips", type=int, default=20_000)
    args = parser.parse_args()
    if args.command == "seek":
        seek(args.files, args.rounds)
    else:
        memory(args.clips)


if __name__ == "__main__":
    main()
