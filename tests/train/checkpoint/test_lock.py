"""One process at a time in a run's folder, told by name, and whatever ended the one before."""

import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stdit_train.checkpoint.lock import HOLDER, LOCK, FolderInUseError, lock_folder
from stdit_train.checkpoint.run_folder import RunFolder

SCRIPT = """
    import sys, time
    from pathlib import Path
    from stdit_train.checkpoint.lock import lock_folder
    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = rf"run is in use by process {holder.pid} on {platform.node()} since .*: wait .* --out"
    with pytest.raises(FolderInUseError, match=said), lock_folder(tmp_path / "run"):
        pytest.fail("held by two")
    with lock_folder(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)  # it cleans nothing up
    holder.wait()
    RunFolder(tmp_path / "run").check_free()  # what it left is no run
    with lock_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()


def test_one_process_may_hold_it_twice(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"):
        with lock_folder(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / HOLDER).is_file()
        (tmp_path / "run" / "file").touch()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) in (["file"], ["file", LOCK])


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "runs" / "demo"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
