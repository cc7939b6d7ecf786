"""Time from a cold start to the finished mp4 with the bundled demo model, and its parts.

    uv run python benchmarks/cold_start.py

Every row is a fresh process. Prints a Markdown table: seconds, and the ratio to a bare `import torch` in the same run.
"""

import statistics
import subprocess
import sys
import tempfile
import time

RUNS = 5
ROWS = {
    "import torch": "import torch",
    "imports of a sample": "import torch, stdit_train.pipeline.load, stdit_data.video.write; "
    "import stdit_model.sampling.pipeline; "
    "from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler; from transformers import T5EncoderModel",
    "stdit --help": "import sys; sys.argv = ['stdit', '--help']; from stdit_cli.main import main; main()",
    'stdit sample "a red circle moving left"': "import sys; "
    "sys.argv = ['stdit', 'sample', 'a red circle moving left']; from stdit_cli.main import main; main()",
}


def seconds(code: str) -> float:
    """Return the wall time of a fresh Python process that runs `code` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main() -> None:
    """Time all rows in turn, so that a busy moment slows all of them."""
    for code in ROWS.values():
        seconds(code)  # file caches and bytecode
    times = {name: [] for name in ROWS}
    for _ in range(RUNS):
        for name, code in ROWS.items():
            times[name].append(seconds(code))
    base = statistics.median(times["import torch"])
    print(f"| from a cold start ({RUNS} runs each, median) | seconds | ratio to import torch |\n|---|---|---|")
    for name, values in times.items():
        print(f"| `{name}` | {statistics.median(values):.2f} | {statistics.median(values) / base:.2f} |")


if __name__ == "__main__":
    main()
