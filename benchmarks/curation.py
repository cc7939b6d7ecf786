"""CPU seconds and memory of `stdit data filter` and `dedup`'s comparison over manifests of many rows.

    uv run python benchmarks/curation.py 1000000

Rows are made up: random scores, and eight random 256-bit hashes a clip, one clip in ten a near copy of the clip before.
Nothing is decoded: that part of `dedup` is a straight line in clips, and depends on them.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from stdit_data.curation.engine import run
from stdit_data.curation.filtering.filter import open_filter
from stdit_data.curation.neighbours import groups_of, near_pairs
from stdit_data.curation.tables import open_rows, write_rows
from stdit_data.workers.executors import Inline

CHUNK = 50_000
FRAMES = 8  # hashes a clip
FLIPPED = 12  # bits by which the frames of a copy differ
SCHEMA = pa.schema([("path", pa.string()), ("motion", pa.float64()), ("sharpness", pa.float64())])


def tables(rows: int) -> Iterator[pa.Table]:
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        paths = [f"/clips/{number:09d}.mp4" for number in range(start, start + count)]
        yield pa.table([paths, rng.gamma(2, 2, count), rng.gamma(2, 200, count)], schema=SCHEMA)


def hashes(clips: int) -> np.ndarray:
    """[clips * FRAMES, 32] uint8."""
    rng = np.random.default_rng(1)
    found = rng.integers(0, 256, (clips, FRAMES, 32), np.uint8)
    copies = np.arange(1, clips, 10)
    bits = np.zeros((len(copies), FRAMES, 256), np.uint8)
    places = rng.integers(0, 256, (len(copies), FRAMES, FLIPPED))
    np.put_along_axis(bits, places, 1, axis=2)
    found[copies] = found[copies - 1] ^ np.packbits(bits, axis=2)
    return found.reshape(-1, 32)


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        source, out = str(Path(folder) / "in.parquet"), str(Path(folder) / "out.parquet")
        write_rows(source, tables(rows), SCHEMA)
        before, start = peak(), time.process_time()
        manifest = open_rows(source)
        outcome = run(open_filter("motion > q10 and sharpness > 50", manifest), manifest, out, Inline())
        seconds = time.process_time() - start
        print(f"| filter | {rows} | {outcome.rows} | {seconds:.1f} | {before:.0f} | {peak():.0f} |", flush=True)
    given = hashes(rows)
    before, start = peak(), time.process_time()
    pairs = near_pairs(given, np.arange(rows + 1) * FRAMES, distance=24, share=0.5)
    groups = len(np.unique(groups_of(rows, pairs)))
    seconds = time.process_time() - start
    print(f"| dedup, comparison | {rows} | {groups} | {seconds:.1f} | {before:.0f} | {peak():.0f} |")


if __name__ == "__main__":
    main()
