"""Estimate what STDiT-XL/2 needs on many devices: memory of each, and bytes that each sends per step.

    uv run python benchmarks/distributed.py

bfloat16 weights and activations, float32 sums, AdamW, checkpointing, one clip at a time on each data-parallel rank;
without VAE and text encoder. Nothing is allocated.
"""

import inspect

from stdit_model import STDiT
from stdit_train.distributed.dims import ParallelDims
from stdit_train.estimate.parallel import sharded_memory, traffic

GIB = 2**30
CLIPS = {
    "64x512": (64, 64, [(8, 1, 1), (8, 8, 1), (64, 1, 1), (64, 8, 1)]),
    "360x512": (360, 64, [(8, 1, 1), (8, 1, 2), (64, 1, 2), (64, 8, 2)]),
    # 1440 frames of 512x512, the report's one-minute clip: 1.5 million tokens
    "1440x512": (1440, 64, [(8, 1, 8), (16, 1, 16), (64, 8, 8), (128, 8, 16), (512, 64, 8), (512, 32, 16)]),
}


def main() -> None:
    """Print a table with a row for each clip and arrangement of GPUs."""
    known = inspect.signature(STDiT.__init__).parameters
    arguments = {name: parameter.default for name, parameter in known.items() if name != "self"}
    print("| clip | GPUs | replicas | GPUs per clip | memory (GiB) | of which activations |"
          " weights, gradients sent (GB) | activations sent (GB) |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name, (frames, side, groupings) in CLIPS.items():
        for processes, copies, sequence in groupings:
            grouping = ParallelDims(processes, copies, sequence)
            shape = (1, 4, frames, side, side)
            held = sharded_memory(arguments, grouping, shape, checkpointing=True)
            sent = traffic(arguments, grouping, shape, checkpointing=True)
            states = (sent.gathered + sent.scattered + sent.summed) / 1e9
            clips = sent.exchanged / 1e9
            print(f"| {name} | {processes} | {copies} | {sequence} | {sum(held.values()) / GIB:.1f} | "
                  f"{held['activations'] / GIB:.1f} | {states:.1f} | {clips:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
