"""Running the command line in this process: what it prints, and its exit code."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def stdit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """`stdit("sample", "a red circle")` in an empty folder, wide enough that lines don't wrap."""
    import torch  # not at the top: the packages' own tests run without the command line

    from stdit_cli.main import main

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # for this process, which has imported it

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["stdit", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    return run
