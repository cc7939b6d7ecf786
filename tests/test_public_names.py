"""Each package shows its public names to dir() and to tab completion, before anything else has been imported."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, rlcompleter, sys
import {package}
heavy = sorted({{"torch", "diffusers", "av", "typer"}} & set(sys.modules))
completer = rlcompleter.Completer({{"{package}": {package}}})
completed = []
while (name := completer.complete("{package}.", len(completed))) is not None:
    completed.append(name)
print(json.dumps([heavy, dir({package}), [name.split(".")[1].rstrip("()") for name in completed], {package}.__all__]))
"""


@pytest.mark.parametrize("package", ["stdit_model", "stdit_data", "stdit_train", "stdit_cli"])
def test_names_are_shown_and_there(package: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(package=package)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy, listed, completed, public = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert public
    assert set(public) <= set(listed)
    assert set(public) <= set(completed)  # the completer gets each of them
