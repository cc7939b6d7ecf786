"""Measure the time from a cold start to the finished mp4 with the bundled demo model, of its parts, and to a refusal.

    uv run python benchmarks/cold_start.py [--runs 5] [--rows NAME ...]

Every row is a fresh process; the rows take turns. Prints a Markdown table: processor time, which other work on the
machine hardly changes, its ratio to a bare `import torch` in the same run, and wall time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def command(*arguments: str) -> str:
    """Return the code of a `stdit` command that may end with an error."""
    return f"import sys; sys.argv = {['stdit', *arguments]}; from stdit_cli.main import main; main()"


TORCH = "import torch"
ROWS = {
    TORCH: TORCH,
    "import torch, torch._dynamo": "import torch, torch._dynamo",
    "imports of a sample": "import torch, stdit_train.pipeline.load, stdit_data.video.write; "
    "import stdit_model.sampling.pipeline; "
    "from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler; from transformers import T5EncoderModel",
    "stdit --help": command("--help"),
    "stdit sample --nope": command("sample", "--nope"),
    "stdit sample x --checkpoint none/such": command("sample", "x", "--checkpoint", "none/such"),
    'stdit sample "a red circle moving left"': command("sample", "a red circle moving left"),
}


def seconds(code: str) -> tuple[float, float]:
    """Return the processor and wall time of a fresh Python process that runs `code` in an empty folder, offline."""
    with tempfile.TemporaryDirectory() as folder:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=False)
        after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - started


def main() -> None:
    """Time all rows in turn, so that a busy moment slows all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    asked = parser.parse_args()
    names = list(dict.fromkeys([TORCH, *asked.rows]))
    for name in names:
        seconds(ROWS[name])  # file caches and bytecode
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(asked.runs):
        for name in names:
            times[name].append(seconds(ROWS[name]))
    base = statistics.median(used for used, _ in times[TORCH])
    print(f"| from a cold start ({asked.runs} runs each, median) | ratio to import torch | processor s | wall s |")
    print("|---|---|---|---|")
    for name, pairs in times.items():
        used, wall = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| `{name}` | {used / base:.2f} | {used:.2f} | {wall:.2f} |")


if __name__ == "__main__":
    main()
