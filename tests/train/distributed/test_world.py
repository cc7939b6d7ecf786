"""What a process does when another one of its run has ended."""

import pytest

from stdit_train.distributed import world as module
from stdit_train.distributed.world import DistributedWorld
from stdit_train.errors import RunEnded

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2612"


def test_a_lost_connection_is_one_line_after_the_launcher_had_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with pytest.raises(RunEnded, match=r"connection to another process of the run is lost .*Connection closed by peer"):
        DistributedWorld(1, 2).__exit__(RuntimeError, RuntimeError(GLOO), None)
    assert waits == [module.GRACE]


def test_a_bug_stays_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waits"))
    DistributedWorld(1, 2).__exit__(RuntimeError, RuntimeError("shape mismatch"), None)
