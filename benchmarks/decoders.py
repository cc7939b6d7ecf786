"""Measure reading a clip's frames beside torchcodec, decord and OpenCV: time, and whether they are the right frames.

    uv run --with torchcodec --with decord python benchmarks/decoders.py [CLIP ...] [--rounds 5]

Each reads 16 frames, every third, from the middle, as RGB in uint8, and opens the file anew; one thread each, CPU time,
in turn. The reference is a full decode with PyAV. A frame is right if no other frame of the video is closer to it; the
difference is the mean over pixels and channels, of 255, since libraries convert to RGB with other roundings. A video of
a minute in 1280x720 is made. Prints Markdown; peers that are not installed are left out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import numpy as np
import torch
from latents import machine
from torch import Tensor

from data import SAMPLING, encode, rgb
from stdit_data.video.frames import read_frames
from stdit_data.video.stream import VideoStream

Read = Callable[[str, list[int]], Tensor]  # of frames by their numbers, [N, H, W, 3]


def ours(path: str, _: list[int]) -> Tensor:
    """This project's reader, which chooses the same frames itself."""

    def convert(frame: av.VideoFrame) -> Tensor:
        plane = frame.reformat(format="rgb24", threads=1).planes[0]
        rows = torch.frombuffer(plane, dtype=torch.uint8).view(plane.height, plane.line_size)
        return rows[:, : 3 * plane.width].unflatten(1, (-1, 3))  # not copied

    with VideoStream(path) as video:
        return torch.stack(read_frames(video, SAMPLING, convert, place=0.5).pictures)


def torchcodec(path: str, numbers: list[int], mode: str) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
    return decoder.get_frames_at(numbers).data


def decord(path: str, numbers: list[int]) -> Tensor:
    from decord import VideoReader, cpu

    return torch.from_numpy(VideoReader(path, ctx=cpu(0), num_threads=1).get_batch(numbers).asnumpy())


def opencv(path: str, numbers: list[int]) -> Tensor:
    import cv2

    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    video.set(cv2.CAP_PROP_POS_FRAMES, numbers[0])
    pictures = []
    for number in range(numbers[0], numbers[-1] + 1):
        video.grab()
        if number in numbers:
            pictures.append(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
    video.release()
    return torch.from_numpy(np.stack(pictures))


def readers() -> dict[str, Read]:
    """Readers by name and version, of the libraries that are installed."""
    known: dict[str, Read] = {
        "torchcodec": partial(torchcodec, mode="exact"),
        "torchcodec, approximate": partial(torchcodec, mode="approximate"),
        "decord": decord,
        "opencv-python-headless": opencv,
    }
    found: dict[str, Read] = {f"ours (PyAV {version('av')})": ours}
    for name, read in known.items():
        package, _, mode = name.partition(", ")
        with suppress(PackageNotFoundError):
            found[f"{package} {version(package)}{mode and f', {mode}'}"] = read
    return found


def wanted(path: str) -> list[int]:
    """The numbers of the frames in the middle."""
    with VideoStream(path) as video:
        first = int(0.5 * (video.count() - SAMPLING.span(video.rate) + 1))
    return list(range(first, first + 3 * SAMPLING.frames, 3))


def decoded(path: str, first: int, last: int) -> dict[int, Tensor]:
    """Frames by number, from a full decode."""
    with VideoStream(path) as video:
        return {n: rgb(frame) for n, (_, frame) in enumerate(video.all_frames()) if first <= n <= last}


def compare(pictures: Tensor, numbers: list[int], frames: dict[int, Tensor]) -> tuple[int, float]:
    """How many pictures are the right frames, and their mean difference from these."""
    if pictures.shape[1:] != frames[numbers[0]].shape:
        return 0, float("nan")  # of another stream
    right, apart = 0, []
    for number, picture in zip(numbers, pictures.float(), strict=True):
        near = {n: (picture - frames[n]).abs().mean().item() for n in range(number - 3, number + 4) if n in frames}
        right += min(near, key=near.__getitem__) == number
        apart.append(near[number])
    return right, statistics.mean(apart)


def main() -> None:
    """Compare and time all readers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", metavar="CLIP")
    parser.add_argument("--frames", type=int, default=1800, help="of the video that is made, at 30 a second")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[1280, 720], metavar=("WIDTH", "HEIGHT"), help="of the same"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"made, {args.frames / 30:.0f} s, {args.size[0]}x{args.size[1]}.mp4"
        encode(made, args.frames, tuple(args.size), {"preset": "veryfast"})
        print(f"{machine()}, one thread, median of {args.rounds} rounds\n")
        print("| clip | reader | CPU, ms | clips/s | of ours | right frames | mean difference |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
        for path in [str(made), *args.clips]:
            numbers = wanted(path)
            frames = decoded(path, numbers[0] - 3, numbers[-1] + 3)
            rows, times = {}, {}
            for name, read in readers().items():
                try:
                    rows[name] = compare(read(path, numbers), numbers, frames)
                    times[name] = [0.0] * args.rounds
                except Exception as error:  # a library that cannot read the clip is a row, too
                    print(f"| {Path(path).name} | {name} | - | - | - | {type(error).__name__} | - |")
            for number in range(args.rounds):
                for name, spent in times.items():
                    started = time.process_time()
                    readers()[name](path, numbers)
                    spent[number] = 1000 * (time.process_time() - started)
            medians = {name: statistics.median(spent) for name, spent in times.items()}
            own = next(iter(medians.values()))
            for name, (right, apart) in rows.items():
                cost = medians[name]
                cells = [f"{cost:.0f}", f"{1000 / cost:.1f}", f"{own / cost:.2f}", f"{right} of {len(numbers)}"]
                print(f"| {Path(path).name} | {name} | {' | '.join(cells)} | {apart:.2f} |", flush=True)


if __name__ == "__main__":
    main()
