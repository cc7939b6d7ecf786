"""The dataset that the guide has the reader write works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_the_dataset_of_the_guide_is_loaded(tmp_path: Path) -> None:
    *_, example = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    script = tmp_path / "fades.py"
    script.write_text(example)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 3, 4, 16, 16])" in done.stdout
    assert done.stdout.count("a fade to") == 2
