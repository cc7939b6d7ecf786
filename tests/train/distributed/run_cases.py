"""Run cases in a group of processes, as the fixture `measure` asks for.

`python SCRIPT N OUT CASE ...` appends to OUT a line of JSON for each case, {"case": CASE, "ranks": [{name: number} of
each of the N processes]}. A case is a function of the script with its arguments, as in "train:seq:fsdp".
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_cases(functions: dict[str, Any]) -> None:
    """Run the cases that the command line names."""
    processes, out, *cases = sys.argv[1:]
    # forked, so that the libraries are imported once
    torch.multiprocessing.start_processes(
        _work, (functions, int(processes), out, cases), nprocs=int(processes), start_method="fork"
    )


def _work(rank: int, functions: dict[str, Any], processes: int, out: str, cases: list[str]) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=processes)
    for case in cases:
        function, *options = case.split(":")
        results: list[Any] = [None] * processes
        dist.all_gather_object(results, functions[function](*options))
        if rank == 0:
            with Path(out).open("a") as file:
                file.write(json.dumps({"case": case, "ranks": results}) + "\n")
    dist.destroy_process_group()
