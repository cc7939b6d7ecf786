"""Measure what each sampler keeps at few steps: the bundled demo model on held-out prompts of `shapes`.

    uv run python benchmarks/samplers.py [--prompts 100] [--steps 2 4 6 8] [--samplers euler unipc dpmsolver++]

Prints a row for each sampler and number of steps: the share of videos whose colour, shape and motion are right, with
its 95 % interval, and the processor time of a video, decoding included, as a ratio to the first row's. One thread.
"""

import argparse
import time

import torch

from stdit_model.sampling.schedulers import FLOW_SAMPLERS, use_sampler
from stdit_train.assets import demo_folder
from stdit_train.evaluation.prompt_following import follow_prompts, score
from stdit_train.pipeline.load import load_pipeline


def main() -> None:
    """Score all samplers on the same prompts and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--samplers", nargs="+", choices=FLOW_SAMPLERS, default=FLOW_SAMPLERS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(str(demo_folder()))
    pipeline(["a red circle moving left"], num_inference_steps=1)  # to warm up
    spent = 0.0

    def generate(prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
        nonlocal spent
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.process_time()
        videos = pipeline(prompts, generator=generators, num_inference_steps=steps).frames
        spent += time.process_time() - started
        return list(videos)

    print("| steps | sampler | all correct | colour | shape | motion | time |\n|---|---|---|---|---|---|---|")
    first = 0.0
    for steps in asked.steps:
        for sampler in asked.samplers:
            use_sampler(pipeline, sampler)
            spent = 0.0
            shares = score(follow_prompts(generate, "heldout", asked.prompts))
            first = first or spent
            total = "{share:.3f} ({low:.3f} to {high:.3f})".format(**shares["all"])
            parts = [f"{shares[part]['share']:.3f}" for part in ("colour", "shape", "motion")]
            print(f"| {' | '.join([str(steps), sampler, total, *parts, f'{spent / first:.2f}'])} |", flush=True)
    print(f"\nThe first row took {first / asked.prompts:.2f} s of processor time a video.")


if __name__ == "__main__":
    main()
