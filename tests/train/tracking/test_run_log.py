"""run.log: what the packages log while a run is under way, however its folder fares."""

import logging
import shutil
from pathlib import Path

from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.tracking.run_log import RunLog


def messages(run: RunFolder) -> list[str]:
    return [line.split(" ", 2)[2] for line in run.log_file.read_text().splitlines()]


def test_lines_wait_for_the_folder(small: TrainConfig, tmp_path: Path) -> None:
    run, log = RunFolder(tmp_path / "run"), logging.getLogger("stdit_train.build")
    with RunLog(run):
        log.info("before")
        assert not run.path.exists()
        run.create(small)
        log.warning("after")
    log.warning("outside")
    logging.getLogger("another").warning("of another package")
    assert messages(run) == ["INFO stdit_train.build: before", "WARNING stdit_train.build: after"]
    with RunLog(run):  # a resumed run
        logging.getLogger("stdit_data.loading").info("appended")
        shutil.rmtree(run.path)
        log.info("kept")
        run.write_anew(small)
    assert messages(run) == ["INFO stdit_train.build: kept"]
