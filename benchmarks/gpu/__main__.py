"""Measure what one GPU does, part by part, and print a table of each.

    uv run python -m benchmarks.gpu --out runs/gpu

The cases are measured in the order of their importance until the budget is spent; the same command goes on with those
that are left. A case that fails or does not fit into memory is a row that says so. Results are kept as JSON lines in
OUT; benchmarks/gpu.md says what runs this without uv.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.setup import Case, Setup, Values

PARTS = ("peaks", "numerics", "attention", "training", "peers", "sampling", "variants", "components", "sharding")
Results = dict[tuple[str, str], Values]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not measured yet, and print all of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results [runs/gpu]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case is started [600]")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--eager", action="store_true", help="leave out the cases that compile")
    parser.add_argument("--tiny", action="store_true", help="tiny models and clips, to try the benchmark out")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch finds no CUDA device; --device cpu --tiny tries the benchmark out", file=sys.stderr
        )
        return 2
    started = time.monotonic()
    about = machine(asked.device, asked.tiny)
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "results.jsonl"
    setup = Setup(torch.device(asked.device), asked.tiny, read(file, about))
    failed: Results = {}
    cases = [(part, case) for part, case in collect(setup, asked.parts, failed) if not (asked.eager and case.compiled)]
    left = run(setup, cases, failed, file, about, started + asked.budget)
    print(report(about, setup.results | failed))
    if left:
        print(f"\n{left} cases are left: run the same command again.")
    return 0


def machine(device: str, tiny: bool) -> dict[str, Any]:
    """Describe what is measured on; results of other machines and versions are not mixed with its own."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "tiny": tiny}


def read(file: Path, about: dict[str, Any]) -> Results:
    """Read the results of this machine."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]  # the last line may have been cut off
    return {(entry["part"], entry["case"]): entry["values"] for entry in entries if entry["about"] == about}


def collect(setup: Setup, parts: list[str], failed: Results) -> list[tuple[str, Case]]:
    """Return the cases of the parts in the order to measure them; a part that cannot be imported is one failure."""
    found: list[tuple[str, Case]] = []
    for part in parts:
        try:
            found += [(part, case) for case in importlib.import_module(f"benchmarks.gpu.{part}").cases(setup)]
        except Exception as error:
            failed[part, "all"] = {"failed": one_line(error)}
            tell(part, "all", failed[part, "all"])
    return sorted(found, key=lambda pair: pair[1].rank)


def run(
    setup: Setup, cases: list[tuple[str, Case]], failed: Results, file: Path, about: dict[str, Any], deadline: float
) -> int:
    """Measure cases, add their results to the file, and return how many are left."""
    todo = [(part, case) for part, case in cases if (part, case.name) not in setup.results]
    for number, (part, case) in enumerate(todo):
        if time.monotonic() > deadline:
            return len(todo) - number
        try:
            values = case.run()
        except torch.OutOfMemoryError:
            values = {"result": "out of memory"}
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return len(todo) - number
        except Exception as error:
            failed[part, case.name] = {"failed": one_line(error)}
            tell(part, case.name, failed[part, case.name])
            if "CUDA error" in str(error):  # the process cannot use the device any more
                return len(todo) - number
            continue
        finally:
            setup.forget_peak()
        setup.results[part, case.name] = values
        entry = {"part": part, "case": case.name, "values": values, "about": about, "date": f"{date.today()}"}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        tell(part, case.name, values)
    return 0


def one_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".replace("|", "/")[:160]


def tell(part: str, case: str, values: Values) -> None:
    """Print a result as it is made, on stderr."""
    text = ", ".join(f"{name} {shown(value)}" for name, value in values.items() if value is not None)
    print(f"{part}: {case}: {text}", file=sys.stderr, flush=True)


def report(about: dict[str, Any], results: Results) -> str:
    """Return all results as Markdown, a table for each part."""
    lines = [f"{about['device']}, torch {about['torch']}, Python {about['python']}, {date.today()}"]
    lines += ["Tiny sizes: these numbers say nothing about a device."] if about["tiny"] else []
    for part in PARTS:
        rows = {case: values for (of, case), values in results.items() if of == part}
        if not rows:
            continue
        module = sys.modules.get(f"benchmarks.gpu.{part}")
        columns = list(dict.fromkeys(name for values in rows.values() for name in values))
        lines += ["", f"## {getattr(module, 'TITLE', part)}", ""]
        lines += [f"| {' | '.join(['', *columns])} |", f"|---|{'---:|' * len(columns)}"]
        for case, values in rows.items():
            lines.append(f"| {' | '.join([case, *(shown(values.get(name)) for name in columns)])} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a value for a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
