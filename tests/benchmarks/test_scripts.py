"""Every benchmark can be imported, and its docstring and the pages beside it name scripts that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
SCRIPTS = [file for file in FILES if not (file.parent / "__init__.py").exists()]
MODULES = [file for file in FILES if file not in SCRIPTS]
PAGES = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.md"))]


def test_all_scripts_are_imported() -> None:
    code = "import importlib, sys\nfor folder, name in zip(sys.argv[1::2], sys.argv[2::2]):\n"
    code += "    sys.path.insert(0, folder)\n    importlib.import_module(name)\n    sys.path.pop(0)\n"
    code += "    sys.modules.pop(name) if name in ('run', 'report', 'model', 'data') else None\n"
    pairs = [word for script in SCRIPTS for word in (str(script.parent), script.stem)]
    for module in MODULES:
        pairs += [str(ROOT), ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
    done = subprocess.run([sys.executable, "-c", code, *pairs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "benchmarks")))
def test_commands_name_scripts_that_exist(page: Path) -> None:
    for script in re.findall(r"\bpython (benchmarks/[\w/]+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
