"""The examples of docs/extending.md work as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"


def run_example(containing: str, folder: Path, more: str = "") -> str:
    """Run the one Python block that contains some text, and return what it prints."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if containing in block)
    script = folder / "example.py"
    script.write_text(example + more)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_data_set_is_loaded(tmp_path: Path) -> None:
    printed = run_example("class Fades", tmp_path)
    assert "torch.Size([8, 3, 4, 16, 16])" in printed
    assert printed.count("a fade to") == 2


def test_the_command_runs(tmp_path: Path) -> None:
    assert run_example("def parameters", tmp_path, "\n\ntyper.run(parameters)\n") == "759,620,768\n"
