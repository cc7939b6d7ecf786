"""The names that `stdit_data` offers can be imported from it, and importing it is fast."""

import json
import subprocess
import sys

import pytest

import stdit_data


@pytest.mark.parametrize("name", stdit_data.__all__)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(stdit_data, name).__name__ == name
    assert name in dir(stdit_data)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'stdit_data' has no attribute 'none'"):
        stdit_data.none  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_av() -> None:
    script = "import json, sys, stdit_data; print(json.dumps(sorted({'torch', 'av', 'numpy'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
