"""Two processes after an error on one: what both must know, and whether both are there for a last checkpoint."""

import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import logging, os, sys
    from datetime import timedelta
    from pathlib import Path
    import torch
    import torch.distributed as dist
    import stdit_train.distributed.world as processes
    from stdit_train.checkpoint import manager
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.distributed.failures import PeerFailed
    from stdit_train.distributed.side_work import SideWork, on_every_rank
    from stdit_train.distributed.world import DistributedWorld
    from stdit_train.errors import CheckpointFailed

    def no_memory(*_):
        raise MemoryError("no pinned memory")

    def read(rank):
        if rank == 1:
            raise OSError(5, "Input/output error", "clip.mp4")
        return "read"

    def work(rank, meeting):
        logging.basicConfig(stream=sys.stdout, format=f"{rank}: %(message)s")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        world = DistributedWorld(rank, 2)
        side_work, calls = SideWork(world), []

        def validate():
            calls.append(on_every_rank(world, lambda: "both"))
            on_every_rank(world, lambda: read(rank))
            calls.append("never")

        assert side_work.together("validation", 7, validate) is None
        assert calls == ["both"], calls
        assert world.all_max(float(rank)) == (1.0,)  # the next message is answered
        assert side_work.together("sampling", 8, lambda: on_every_rank(world, lambda: rank)) == rank

        world.checkpoint_group = dist.new_group(backend="gloo")
        checkpoints = manager.CheckpointManager(RunFolder(Path(meeting).parent / "run"), 2, None, True, world)
        if rank == 1:
            manager.begin_write = no_memory
        try:
            checkpoints.save(1, {"weights": torch.ones(2)}, {"step": 1})
        except (CheckpointFailed, PeerFailed) as error:
            print(type(error).__name__, error)
        assert world.all_max(float(rank)) == (1.0,)

        processes.PATIENCE = 2.0
        world._meeting_group = dist.new_group(timeout=timedelta(seconds=2.0), backend="gloo")
        assert world.all_arrive()
        if rank == 1:
            assert not world.all_arrive()  # the other one is elsewhere
        assert world.all_max(float(rank)) == (1.0,)

    work(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads that wait for a missing process abort an ordinary exit
"""


def test_an_error_of_one_process_is_known_to_the_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        (out, err), (silent, other) = (process.communicate(timeout=120) for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], err + other
    assert out.startswith("0: step 7: validation failed (OSError: [Errno 5] Input/output error: 'clip.mp4')")
    assert "on process 1:" in out  # with its traceback
    assert out.endswith("PeerFailed 1\n")
    assert silent == (
        "CheckpointFailed process 1 cannot copy the tensors of a checkpoint (no pinned memory); there is no checkpoint "
        "yet. Resume with --resume and --set checkpoint_async=false, which needs no copy\n"
    )
