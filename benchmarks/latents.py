"""Measure reading a cache: the loader against a sequential read of the same files, and its share of a training step;
and what it costs to encode the clips of one long video in a random order.

    uv run python benchmarks/latents.py read [--gib 2]
    uv run python benchmarks/latents.py step [--steps 8] [--side 256]
    uv run python benchmarks/latents.py order [--seconds 300]

The first two make a cache of random numbers in the shapes of a published stage: latents of 16x256x256 clips (256 KiB
each) and 120 T5-XXL tokens (960 KiB each), in shards of 256 MiB. Smaller frames (--side) make shorter steps that read
nearly as much, so the loader has less time. Prints Markdown.
"""

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.datasets.videos import open_videos
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, text_job, video_job
from stdit_data.latents.order import encoding_order
from stdit_data.loading.loader import ClipLoader

CHANNELS, FRAMES, TOKENS, WIDTH = 4, 16, 120, 4096


class Clips:
    """Stands in for clips that would be decoded: the job needs their number and shape alone."""

    def __init__(self, length: int, side: int) -> None:
        self.inner = ShapesDataset(frames=FRAMES, height=side, width=side, length=length)
        self.blank = self.inner.load(0)

    def __len__(self) -> int:
        return len(self.inner)

    def bucket(self, index: int) -> tuple[int, int, int]:
        return self.inner.bucket(index)

    def path(self, index: int) -> str:
        return self.inner.path(index)

    def caption(self, index: int) -> str:
        return f"caption {index}"

    def load(self, index: int, *, seed: int = 0, epoch: int = 0) -> object:
        return self.blank


def make(folder: Path, clips: int, side: int = 256) -> Path:
    """A cache of random numbers."""
    dataset, numbers = Clips(clips, side), torch.Generator().manual_seed(0)
    latent = (CHANNELS, FRAMES, side // 8, side // 8)
    moments = torch.randn(1, 2 * CHANNELS, *latent[1:], generator=numbers)
    video = VideoEncoder(lambda _: moments.roll(1), lambda _: latent, {"source": "none"})
    about = {"source": "random", "hash": "0" * 16, "samples": clips}
    video_job(dataset, str(folder), video, {}, about).run()
    states = torch.randn(TOKENS, WIDTH, generator=numbers)
    encoder = TextEncoder(lambda texts: [states] * len(texts), str, WIDTH, TOKENS, {"source": "none"})
    text_job([dataset.caption(i) for i in range(clips)], str(folder), encoder, about).run()
    return folder


def forget(folder: Path) -> None:
    """Drops the shards from the page cache, as far as a user may."""
    for path in folder.rglob("*.safetensors"):
        drop(path)


def drop(path: Path) -> None:
    """Drops a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def sequential(folder: Path) -> tuple[int, float]:
    """All files from end to end, in pieces of 8 MiB: bytes and seconds."""
    size, buffer, started = 0, bytearray(8 * 2**20), time.perf_counter()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size, time.perf_counter() - started


def loading(folder: Path, clips: int, window: int) -> tuple[int, float]:
    """One epoch through the loader, in its order: bytes of tensors and seconds."""
    batch = 16
    loader = ClipLoader(LatentDataset(str(folder), window=window), global_batch=batch, seed=0, workers=2)
    size, started = 0, time.perf_counter()
    for (micro,) in islice(loader, clips // batch):
        size += micro.video.nbytes + sum(text.nbytes for text in micro.texts or [])
    seconds = time.perf_counter() - started
    loader.close()
    return size, seconds


def read(gib: float, rounds: int, where: Path | None) -> None:
    """Ways in turn, so that a busy moment meets all; medians of the rounds."""
    clips = int(gib * 2**30 / (2**18 + TOKENS * WIDTH * 2)) // 16 * 16
    with tempfile.TemporaryDirectory(dir=where) as folder:
        cache = make(Path(folder), clips)
        print(f"{machine()}; {clips} clips, {len(list(cache.rglob('*.safetensors')))} files, median of {rounds}\n")
        print("| state | sequential, MB/s | loader, window 2, MB/s | loader, all, MB/s | window 2 / sequential |")
        print("|---|---:|---:|---:|---:|")
        for state in ("not in memory", "in memory"):
            rates: list[list[float]] = [[], [], []]
            for _ in range(rounds):
                for rate, way in zip(rates, (None, 2, 0), strict=True):
                    if state == "not in memory":
                        forget(cache)
                    size, seconds = sequential(cache) if way is None else loading(cache, clips, way)
                    rate.append(size / seconds / 1e6)
            plain, window, full = (statistics.median(rate) for rate in rates)
            print(f"| {state} | {plain:.0f} | {window:.0f} | {full:.0f} | {window / plain:.2f} |", flush=True)


def step(steps: int, batch: int, side: int, where: Path | None) -> None:
    """Seconds that a B/2 step waits for its batch, of all its seconds; the files are dropped from memory first."""
    from stdit_model import STDiT
    from stdit_model.presets import preset
    from stdit_train.config.schema import ObjectiveConfig
    from stdit_train.loss.objective import training_loss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = STDiT(**preset("B/2"), caption_channels=WIDTH, model_max_length=TOKENS).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        cache = make(Path(folder), batch * (steps + 4), side)
        forget(cache)
        gc.collect()
        loader = ClipLoader(LatentDataset(str(cache)), global_batch=batch, seed=0, workers=2)
        waits, times = [], []
        for wait, batches in timed(loader, steps + 1):
            started = time.perf_counter()
            (micro,) = batches
            moments = micro.video.to(device)
            x0 = moments[:, :CHANNELS].float() * 0.18215
            y = torch.stack([text.float() for text in micro.texts or []]).to(device)
            mask = torch.ones(y.shape[:2], device=device)
            level = torch.rand(len(y), device=device)
            with torch.autocast(device.type, torch.bfloat16):
                terms = training_loss(model, ObjectiveConfig(), x0, torch.randn_like(x0), level, y, mask)
            terms["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            waits.append(wait)
            times.append(wait + time.perf_counter() - started)
        loader.close()
    # the first step waits for the first batch, whatever the loader
    share = sum(waits[1:]) / sum(times[1:])
    print(
        f"{machine()}, {device}; B/2, {batch} clips of {FRAMES}x{side}x{side} a step, {steps} steps after the first\n"
    )
    print("| a step, s | of it waiting, ms | share | first batch, ms |\n|---:|---:|---:|---:|")
    mean, waited = statistics.mean(times[1:]), 1000 * statistics.mean(waits[1:])
    print(f"| {mean:.2f} | {waited:.2f} | {100 * share:.3f} % | {1000 * waits[0]:.0f} |")


def order(seconds: int, rounds: int, where: Path | None) -> None:
    """Read the clips of one long video, 3 s each, in the manifest's order and in a cache's: 16x256x256, two threads."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        video, manifest = Path(folder) / "long.mp4", Path(folder) / "clips.csv"
        write_long_video(video, seconds)
        rows = [f"{video.name},clip,{start},{start + 3}" for start in range(0, seconds - 2, 3)]
        manifest.write_text("\n".join(["path,caption,start,end", *rows]) + "\n")
        clips = open_videos(manifest, frames=FRAMES, height=256, width=256)
        orders = {"manifest": list(range(len(clips))), "cache": encoding_order(len(clips), 0).tolist()}
        print(f"{machine()}; {len(clips)} clips of {video.stat().st_size / 1e6:.0f} MB, median of {rounds}\n")
        print("| file | order | clips/s | CPU, ms per clip |\n|---|---|---:|---:|")
        for state in ("in memory", "not in memory"):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}
            for _ in range(rounds):
                for name, indices in orders.items():
                    if state == "not in memory":
                        drop(video)
                    began, cpu = time.perf_counter(), time.process_time()
                    with ThreadPoolExecutor(2) as pool:
                        for _clip in pool.map(lambda index: clips.load(index, seed=0, epoch=0), indices):
                            pass
                    took = time.perf_counter() - began, time.process_time() - cpu
                    found[name].append((len(indices) / took[0], 1000 * took[1] / len(indices)))
            for name, numbers in found.items():
                rate, cost = (statistics.median(column) for column in zip(*numbers, strict=True))
                print(f"| {state} | {name} | {rate:.2f} | {cost:.0f} |", flush=True)


def write_long_video(path: Path, seconds: int) -> None:
    """Write 640x360 at 24 frames/s, H.264, 12 s between key frames at most: noise that moves, with a cut every 5 s."""
    numbers, size = np.random.default_rng(0), (360, 640)
    noise = numbers.integers(0, 255, (130, 560, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = 288
        for number in range(24 * seconds):
            if number % 120 == 0:
                x, y = (
                    numbers.integers(0, noise.shape[1] - size[1] - 120),
                    numbers.integers(0, noise.shape[0] - size[0]),
                )
            left = x + number % 120
            picture = np.ascontiguousarray(noise[y : y + size[0], left : left + size[1]])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def timed(loader: ClipLoader, count: int) -> Iterator[tuple[float, list]]:
    """Seconds waited for each step's batches, and these."""
    reading = iter(loader)
    for _ in range(count):
        started = time.perf_counter()
        batches = next(reading)
        yield time.perf_counter() - started, batches


def machine() -> str:
    """Describe this machine."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    """Run the command that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, help="folder on the disk to measure; the system's temporary one without")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("read")
    one.add_argument("--gib", type=float, default=2.0)
    one.add_argument("--rounds", type=int, default=3)
    two = commands.add_parser("step")
    two.add_argument("--steps", type=int, default=8)
    two.add_argument("--batch", type=int, default=2)
    two.add_argument("--side", type=int, default=256, help="pixels of a frame")
    three = commands.add_parser("order")
    three.add_argument("--seconds", type=int, default=300, help="of the video")
    three.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.command == "read":
        read(args.gib, args.rounds, args.where)
    elif args.command == "order":
        order(args.seconds, args.rounds, args.where)
    else:
        step(args.steps, args.batch, args.side, args.where)


if __name__ == "__main__":
    main()
