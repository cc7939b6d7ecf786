"""Shell completion, as bash asks for it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from stdit_cli import completion, main
from stdit_model.presets import Variant
from stdit_model.sampling.schedulers import SAMPLERS
from stdit_train.config.keys import known_keys
from stdit_train.config.load import curriculum_names, stage_names
from stdit_train.hardware import DEVICES

MOST_OPTIONS = 14  # of a command in one panel of its help
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
        ("stdit serve --max-f", ["--max-frames"]),
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
    assert completion.samplers("") == list(SAMPLERS)


def test_help_lists_these_names_and_groups_long_lists() -> None:
    commands = {name: command.load(name) for name, command in main.Commands.lazy.items()}
    options = {name: {option.name: option for option in command.params} for name, command in commands.items()}
    for name in SAMPLERS:
        assert name in options["sample"]["sampler"].help
    for name in DEVICES:
        assert name in options["train"]["gpu"].help
        assert name in options["plan"]["gpu"].help
    for command, its in options.items():
        panels = Counter(getattr(o, "rich_help_panel", None) for o in its.values() if not getattr(o, "hidden", False))
        assert max(panels.values(), default=0) <= MOST_OPTIONS, command
        if len(panels) > 1:  # all of them are in one
            assert {o.name for o in its.values() if getattr(o, "rich_help_panel", None) is None} <= {
                "checkpoint",
                "checkpoints",
                "prompts",
                "settling",
            }
