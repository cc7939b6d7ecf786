"""Memory stays flat while the loader reads. `benchmarks/data.py memory` is the longer version."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from stdit_data.datasets.videos import open_videos
from stdit_data.loading.loader import ClipLoader

STATM = Path("/proc/self/statm")


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_resident_memory_is_flat(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    """After 5,000 clips, some of them bad, no more than 5 % above the first 1,000."""
    for number in range(12):
        path = encode_clip(tmp_path / f"{number}.mp4", frames=24, size=(96 + 8 * (number % 3), 64))
        path.with_suffix(".txt").write_text(f"clip {number}")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:2000])
    (tmp_path / "broken.txt").write_text("broken")
    dataset = open_videos(tmp_path, frames=4, height=48, width=48, crop="random")
    loader = ClipLoader(dataset, global_batch=20, seed=0, rejects=tmp_path / "rejects.jsonl", max_reject_share=0.2)
    steps = iter(loader)
    for _ in islice(steps, 50):
        pass
    early = resident()
    for _ in islice(steps, 200):
        pass
    late = resident()
    loader.close()
    assert late <= 1.05 * early, f"{early / 2**20:.1f} MiB after 1,000 clips, {late / 2**20:.1f} after 5,000"
