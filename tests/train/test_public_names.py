"""The public names of stdit_train are there, and cost nothing until they are used."""

import subprocess
import sys
from importlib import import_module

import pytest

import stdit_train


@pytest.mark.parametrize("name", stdit_train.__all__)
def test_each_name_is_imported_from_its_module(name: str) -> None:
    found = getattr(stdit_train, name)
    assert getattr(import_module(found.__module__), name) is found
    assert found.__doc__


def test_names_are_listed_and_others_are_refused() -> None:
    assert dir(stdit_train) == sorted(stdit_train.__all__) == sorted(stdit_train._MODULES)
    with pytest.raises(AttributeError, match=r"'stdit_train' has no attribute 'open_run'"):
        stdit_train.open_run  # noqa: B018


def test_import_without_torch() -> None:
    script = "import sys, stdit_train; assert not {'torch', 'numpy', 'pydantic', 'stdit_model'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
