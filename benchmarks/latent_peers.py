"""Measure the loader of latents beside plain reads, WebDataset and MosaicML Streaming, from a disk and from a store.

    uv run --with webdataset --with mosaicml-streaming python benchmarks/latent_peers.py [--clips 320] [--rounds 3]

All hold the same samples, random numbers in the shapes of a published stage: latents of 16x256x256 clips (256 KiB each)
and 120 T5-XXL tokens (960 KiB each), in files of equal size. Each gives batches of 8 clips in shuffled order: the
latents in one tensor, the texts in a list. The store is an S3 server on this machine that answers each request after
30 ms. Each pass is a process of its own, in turn with the others; the clock runs from its first batch to its last.
Prints Markdown.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from latents import CHANNELS, FRAMES, TOKENS, WIDTH, Clips, machine
from torch.utils.data import DataLoader, IterableDataset

from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, text_job, video_job
from stdit_data.loading.loader import ClipLoader

BATCH, WORKERS, LATENCY = 8, 2, 0.03
VIDEO, TEXT = (2 * CHANNELS, FRAMES, 32, 32), (TOKENS, WIDTH)
SHARD = 16 * 2**20  # bytes of a file, for all
WAYS = ("plain", "ours", "webdataset", "streaming")
FROM_STORE = ("plain", "ours", "webdataset")  # Streaming's downloads from this server come out empty; plain: from disk


class Store(BaseHTTPRequestHandler):
    """As much of S3 as reading objects takes, LATENCY seconds late."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *rest: Any) -> None:
        self.folder = folder
        super().__init__(*rest)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(LATENCY)
        path = self.folder / self.path.partition("?")[0].removeprefix("/bucket/")
        if "list-type" in self.path or not path.is_file():
            body = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>"
            self.send_response(200 if "list-type" in self.path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")
            return
        first, size = 0, path.stat().st_size
        last = size - 1
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        for name, value in (
            ("Content-Length", str(last - first + 1)),
            ("Accept-Ranges", "bytes"),
            ("ETag", f'"{size}"'),
            ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                self.wfile.flush()
                while first <= last:
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)

    do_HEAD = do_GET


def make(folder: Path, clips: int) -> None:
    """Write the same samples in the formats of all."""
    import webdataset
    from streaming import MDSWriter

    dataset, numbers = Clips(clips, 256), torch.Generator().manual_seed(0)
    moments = torch.randn(1, *VIDEO, generator=numbers)
    states = torch.randn(*TEXT, generator=numbers)
    about = {"source": "random", "hash": "0" * 16, "samples": clips}
    encoder = VideoEncoder(lambda _: moments, lambda _: (CHANNELS, *VIDEO[1:]), {"source": "none"})
    video_job(dataset, str(folder / "ours"), encoder, {}, about, shard_bytes=SHARD).run()
    texts = TextEncoder(lambda batch: [states] * len(batch), str, WIDTH, TOKENS, {"source": "none"})
    captions = [dataset.caption(i) for i in range(clips)]
    text_job(captions, str(folder / "ours"), texts, about, shard_bytes=SHARD).run()
    video, text = (bytes(t.bfloat16().contiguous().view(torch.uint8).numpy()) for t in (moments, states))
    (folder / "webdataset").mkdir()
    with webdataset.ShardWriter(str(folder / "webdataset" / "%05d.tar"), maxsize=SHARD, verbose=0) as out:
        for i in range(clips):
            out.write({"__key__": f"{i:06d}", "video": video, "text": text})
    columns = {"video": "bytes", "text": "bytes"}
    with MDSWriter(out=str(folder / "streaming"), columns=columns, size_limit=SHARD) as out:
        for _ in range(clips):
            out.write({"video": video, "text": text})


def tensors(sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of a sample of the peers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that is not to be written to
        video, text = (torch.frombuffer(sample[name], dtype=torch.bfloat16) for name in ("video", "text"))
    return video.view(VIDEO), text.view(TEXT)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    videos, texts = zip(*samples, strict=True)
    return torch.stack(videos), list(texts)


class Plain(IterableDataset):
    """The files of our cache from end to end, without making tensors of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[int]:
        buffer = bytearray(8 * 2**20)
        for path in sorted(self.folder.rglob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield count


def batches(way: str, folder: Path, port: int | None, copies: Path) -> Iterator[Any]:
    """Batches of one epoch, of a way to read."""
    url = f"http://127.0.0.1:{port}/bucket" if port else str(folder)
    if way == "ours":
        source = f"{'s3://bucket' if port else folder}/ours"
        loader = ClipLoader(LatentDataset(source, window=2, copies=copies), global_batch=BATCH, seed=0, workers=WORKERS)
        for (micro,) in loader:
            if micro.epoch:
                loader.close()
                return
            yield micro.video, micro.texts
    elif way == "webdataset":
        import webdataset

        names = sorted(path.name for path in (folder / "webdataset").glob("*.tar"))
        data = webdataset.WebDataset([f"{url}/webdataset/{name}" for name in names], shardshuffle=len(names))
        yield from DataLoader(data.shuffle(32).map(tensors), batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
    else:
        from streaming import StreamingDataset

        class Clips(StreamingDataset):
            def __getitem__(self, at: int) -> Any:
                return tensors(super().__getitem__(at))

        data = Clips(local=f"{folder}/streaming", shuffle=True, batch_size=BATCH)
        yield from DataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)


def one_pass(way: str, folder: Path, port: int | None) -> dict[str, float]:
    """Read an epoch: clips or bytes, and seconds from the first batch to the last."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    if way == "plain":
        size = sum(Plain(folder / "ours"))
        return {"count": size, "seconds": time.perf_counter() - begun}
    count = 0
    with tempfile.TemporaryDirectory() as copies:
        reading = batches(way, folder, port, Path(copies))
        next(reading)
        first = time.perf_counter()
        for video, texts in reading:
            assert video.shape == (len(texts), *VIDEO) and texts[-1].shape == TEXT
            assert video.dtype == texts[0].dtype == torch.bfloat16
            count += len(texts)
        return {"count": count, "seconds": time.perf_counter() - first, "first": first - begun}


def main() -> None:
    """Measure all ways, or make one pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--places", nargs="+", choices=["disk", "store"], default=["disk", "store"])
    parser.add_argument("--where", type=Path, help="folder on the disk to measure; the system's temporary one without")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_pass(args.one, args.where, args.port)))
        return
    with tempfile.TemporaryDirectory(dir=args.where) as folder:
        make(Path(folder), args.clips)
        store = ThreadingHTTPServer(("127.0.0.1", 0), partial(Store, Path(folder)))
        store.daemon_threads = True
        Thread(target=store.serve_forever, daemon=True).start()
        peers = ", ".join(f"{name} {version(name)}" for name in ("webdataset", "mosaicml-streaming"))
        size = sum(path.stat().st_size for path in Path(folder, "ours").rglob("*.safetensors"))
        print(f"{machine()}, {peers}; {args.clips} clips, {size / 1e6:.0f} MB, median of {args.rounds} rounds\n")
        print(
            "| from | plain reads, MB/s | ours, clips/s | WebDataset | Streaming | ours / plain | / WDS | / Streaming |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for place in args.places:
            port = store.server_port if place == "store" else None
            ways = [way for way in WAYS if place == "disk" or way in FROM_STORE]
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way in ways:
                    found = run(way, folder, port)
                    rates[way].append(found["count"] / found["seconds"])
            found = {way: statistics.median(rates[way]) for way in ways}
            plain, ours = found["plain"], found["ours"]
            peers = [found.get(way) for way in ("webdataset", "streaming")]
            cells = [f"{plain / 1e6:.0f}", f"{ours:.0f}", *("-" if peer is None else f"{peer:.0f}" for peer in peers)]
            cells.append(f"{ours * size / args.clips / plain:.2f}")
            cells += ["-" if peer is None else f"{ours / peer:.2f}" for peer in peers]
            print(f"| {place} | {' | '.join(cells)} |", flush=True)


def run(way: str, folder: str, port: int | None) -> dict[str, float]:
    """Make a pass in a process of its own."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    address = f"http://127.0.0.1:{port}"
    places = {"AWS_ENDPOINT_URL": address} if port else {}
    command = [sys.executable, __file__, "--one", way, "--where", folder, *(["--port", str(port)] if port else [])]
    environment = {**os.environ, **keys, **places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
