"""Shell completion, as bash asks for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from stdit_cli import completion
from stdit_model.presets import Variant
from stdit_model.sampling.schedulers import EPSILON_SAMPLERS, FLOW_SAMPLERS
from stdit_train.config.load import curriculum_names, known_keys, stage_names
from stdit_train.hardware import DEVICES

STDIT = Path(sys.executable).with_name("stdit")


def completed(words: str) -> list[str]:
    """What bash offers for the last of the words."""
    environment = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    environment["_STDIT_COMPLETE"] = "complete_bash"
    done = subprocess.run([STDIT], env=environment, text=True, capture_output=True, check=True)
    return done.stdout.split()


def test_the_script_for_bash() -> None:
    script = f"{STDIT} --show-completion; true"  # as typed into bash, which stays the parent
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=True)
    assert "_STDIT_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default -F _stdit_completion stdit" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("stdit tr", ["train"]),
        ("stdit train --stage 16x256", ["16x256", "16x256-hq"]),
        ("stdit train --set optimizer.l", ["optimizer.lr="]),
        ("stdit sample --sampler dd", ["ddpm", "ddim"]),
    ],
)
def test_what_is_offered(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


def test_the_names_are_those_that_the_commands_take() -> None:
    assert sorted(completion.stages("")) == sorted(stage_names())
    assert sorted(completion.curricula("")) == sorted(curriculum_names())
    assert completion.gpus("") == [*DEVICES, "cpu"]
    assert completion.settings("") == [f"{key}=" for key in known_keys()]
    assert completion.variants("") == list(get_args(Variant))
    assert completion.SAMPLERS == FLOW_SAMPLERS + EPSILON_SAMPLERS
