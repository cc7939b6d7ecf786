"""Where the time goes that is spent waiting for data."""

import logging

import pytest
import torch

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.memory import InMemoryLatents
from stdit_train.config.load import load_stage
from stdit_train.tracking.data_wait import STEPS, DataWait


def test_encoding_on_first_use_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stdit_train")
    clips = InMemoryLatents(ShapesDataset(length=20), lambda video: torch.zeros(1), (4, 8, 8))
    wait = DataWait(clips, load_stage("demo"))
    (line,) = caplog.messages
    assert "until all are, for 3 steps, most of the time is spent waiting for data" in line
    for _ in range(2 * STEPS):
        wait.add(1.0, 0.9)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("waited", "said"), [(0.61, ["61 %"]), (0.1, [])])
def test_a_high_share_is_told_once(waited: float, said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stdit_train")
    wait = DataWait(ShapesDataset(length=20), load_stage("demo", {"data.workers": 3}))
    for _ in range(3 * STEPS):
        wait.add(1.0, waited)
    assert len(caplog.messages) == len(said)
    for word in said:
        assert caplog.messages[0].startswith(word)
        assert "data.workers=6" in caplog.messages[0] and "stdit data encode" in caplog.messages[0]
