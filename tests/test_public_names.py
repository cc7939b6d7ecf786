"""Each package shows its public names to dir(), and thus to tab completion, before anything else has been imported."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ["stdit_model", "stdit_data", "stdit_train", "stdit_cli"]
SCRIPT = """
import json, sys
import {0} as package
print(json.dumps([sorted({{"torch", "diffusers", "av", "typer"}} & set(sys.modules)), dir(package), package.__all__]))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_shown_before_anything_is_imported(package: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy, listed, public = json.loads(done.stdout)
    assert heavy == []
    assert public
    assert set(public) <= set(listed)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_is_there(package: str) -> None:
    module = import_module(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'none'"):
        _ = module.none
