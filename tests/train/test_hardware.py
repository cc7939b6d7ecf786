"""What is asked of the machine."""

import platform
import resource

import pytest
import torch

from stdit_train.assets import DEMO
from stdit_train.components import load
from stdit_train.hardware import keep_freed_memory


def page_faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)  # 10,240 pages, above glibc's greatest limit of its own
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    keep_freed_memory()
    page_faults()  # the first time it is mapped
    assert page_faults() < 10_000  # of 102,400 if each were mapped anew


def test_encoders_on_a_cpu_keep_the_memory_that_they_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does: `stdit data encode` takes up to twice the time without it."""
    calls: list[str] = []
    monkeypatch.setattr(load, "keep_freed_memory", lambda: calls.append("kept"))
    load.load_vae(DEMO, torch.device("cpu"))
    load.load_text_encoder(DEMO, torch.device("cpu"), "fp32")
    assert calls == ["kept", "kept"]
