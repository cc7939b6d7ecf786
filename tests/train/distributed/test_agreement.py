"""Two processes before the first step: one opens the clips for both, and what differs between them is refused."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stdit_data.video.write import write_mp4
from stdit_train.distributed import agreement
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError

SCRIPT = """
    import os, sys
    from pathlib import Path
    import torch.distributed as dist
    from stdit_data.errors import ClipError
    from stdit_data.loading.loader import ClipLoader
    from stdit_data.manifests import metadata
    from stdit_train.checkpoint import shared
    from stdit_train.config.schema import DataConfig
    from stdit_train.data.videos import open_clips
    from stdit_train.distributed.agreement import check_agreement
    from stdit_train.distributed.failures import PeerFailed
    from stdit_train.distributed.world import DistributedWorld
    from stdit_train.errors import ConfigError

    def refused(act):
        try:
            act()
        except (ConfigError, PeerFailed) as error:
            return f"{type(error).__name__} {error}"
        return "accepted"

    def work(rank, folder):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        world = DistributedWorld(rank, 2)
        if rank == 1:
            def fail(url, **_):
                raise ClipError(url, "a passing fault")
            metadata.probe = fail
        data = DataConfig(source=f"{folder}/set.csv", frames=2, buckets=("2x16x16", "2x16x32"))
        for own in (None, world):
            clips = open_clips(data, own)
            buckets = [str(clips.bucket(index)) for index in range(len(clips))]
            print(buckets)
            order = ClipLoader(clips, global_batch=2, seed=0).order.fingerprint()
            print(refused(lambda: check_agreement(world, {"the step": 3, "the order of the clips": order})))
        print(refused(lambda: shared.check_shared(world, Path(folder) / "run")))
        shared.VISIBLE = 0.5
        print(refused(lambda: shared.check_shared(world, Path(folder) / f"run{rank}")))

    work(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an ordinary exit
"""


def test_two_processes(tmp_path: Path) -> None:
    rows = ["path,caption"]
    for number in range(4):
        write_mp4(tmp_path / f"{number}.mp4", torch.zeros(3, 4, 16, 16 + 16 * (number % 2)), fps=8)
        rows.append(f"{number}.mp4,a caption")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        (out, err), (other_out, other_err) = (process.communicate(timeout=200) for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], err + other_err
    first, second = out.splitlines(), other_out.splitlines()
    right = "['2x16x16', '2x16x32', '2x16x16', '2x16x32']"
    assert (first[0], second[0]) == (right, "['2x16x16', '2x16x16', '2x16x16', '2x16x16']")  # each for itself
    assert first[1].startswith("ConfigError process 1 on ")
    assert " differs from process 0 in the order of the clips: " in first[1]
    assert (first[2], second[2]) == (right, right)  # the first for both
    assert (first[3], second[3]) == ("accepted", "accepted")
    assert (first[4], second[4]) == ("accepted", "accepted")  # a folder that both see
    assert first[5].startswith("ConfigError process 1 on ")
    assert f"does not see the run folder {tmp_path}/run0 of process 0 on " in first[5]
    assert [line.partition(" ")[0] for line in (second[1], second[5])] == ["PeerFailed", "PeerFailed"]
    assert not list(tmp_path.glob("run*"))


def test_the_first_difference_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"process 2 on c differs from process 0 in the setting seed: 1 instead of 0;"
    ):
        agreement._compare(
            [("a", {"the setting seed": 0}), ("b", {"the setting seed": 0}), ("c", {"the setting seed": 1})]
        )
    agreement.check_agreement(World(), {"the setting seed": 0})
