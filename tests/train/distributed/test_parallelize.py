"""Training and sampling on two and four gloo processes against one: losses, gradients, weights, videos, bytes.

The cases run in a process group of their own (see parallel_cases.py), all of a file's two-process ones in one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_model.presets import VARIANTS
from stdit_train.config.load import ConfigError
from stdit_train.distributed.dims import ParallelDims

LIMIT = 1e-5  # relative
KEY_BIASES = 2 * 3 * 2e-5  # absolute: Adam moves them by up to its rate a step, in a direction that rounding decides
Numbers = dict[str, float]
Measure = Callable[..., dict[str, list[Numbers]]]


def check_training(numbers: Numbers) -> None:
    for name in ("loss", "gradients", "sgd", "adamw"):
        assert numbers[name] < LIMIT, (name, numbers)
    assert numbers["sgd.key_biases"] < 1e-6
    assert numbers["adamw.key_biases"] < KEY_BIASES
    assert min(numbers["sgd.moved"], numbers["adamw.moved"]) > 10 * LIMIT  # else they agree for want of training
    for name in ("gathered", "scattered", "summed", "exchanged"):
        assert numbers[f"counted.{name}"] == numbers[f"paper.{name}"], name


def test_two_processes(measure: Measure) -> None:
    """Sharded weights and shared clips, neither frames (5) nor positions (9) even; bytes as on paper."""
    training = ["train:seq:sp", "train:dit:sp"]
    shared = {"along_the_way:fsdp": 2.0, "along_the_way:sp": 3.0}
    others = ["blocks:seq:sp", "sample:seq:sp:iddpm", "rest:seq:fsdp"]
    results = measure(2, [*training, *others, *shared])
    for numbers in [ranks for case in training for ranks in results[case]]:
        check_training(numbers)
        assert numbers["held"] == 0.5
        assert numbers["counted.exchanged"] > 0
    for numbers in results["blocks:seq:sp"]:
        check_blocks(numbers)
    for numbers in results["sample:seq:sp:iddpm"]:
        assert numbers["video"] < LIMIT < numbers["moved"]
    for numbers in results["rest:seq:fsdp"]:
        check_rest(numbers)
    for case, encoded in shared.items():
        for numbers in results[case]:
            assert numbers["encoded"] == encoded  # of three prompts: those of this process, or of its group
            assert numbers["videos"] < 1.01 / 127.5 < 0.1 < numbers["different"], case  # of 8-bit pixels
    assert results["rest:seq:fsdp"][0]["gathered"] < LIMIT
    assert results["rest:seq:fsdp"][1]["gathered"] == 0.0  # tensors: only the first process has them


def check_blocks(numbers: Numbers) -> None:
    assert len(numbers) == 2 * 3  # tokens after each of three blocks, and their gradients
    assert max(numbers.values()) < LIMIT, numbers


def check_compiled(numbers: Numbers) -> None:
    assert numbers["graphs"] > 0  # something was compiled
    assert max(numbers["loss"], numbers["weights"]) < LIMIT < numbers["moved"], numbers


@pytest.mark.slow
def test_compiled_blocks_in_shards(measure: Measure) -> None:
    """Losses and weights of three steps with compiled blocks are those without, in shards and with shared clips."""
    ways = ["seq:fsdp:inductor:checkpointing", "seq:sp:inductor", "dit:sp:aot_eager:selective"]
    for ranks in measure(2, [f"compiled:{way}" for way in ways]).values():
        for numbers in ranks:
            check_compiled(numbers)


def check_rest(numbers: Numbers) -> None:
    assert numbers["fresh"] == 0.0  # to the bit, on any number of processes
    for name in ("norm", "clipped", "ema", "ema_forward"):
        assert numbers[name] < LIMIT, (name, numbers)
    assert numbers["bf16.timestep"] == 997.0  # bfloat16 would make 996 of it
    assert numbers["bf16.gradients"] < 0.05
    assert numbers["bf16.stored_in"] == 1.0  # float32 shards


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_all_ways(measure: Measure, variant: str) -> None:
    ways = ["fsdp", "dp", "sp", "sp:even", "sp:patch2", "sp:checkpointing", "fsdp:checkpointing"]
    cases = [f"train:{variant}:{way}" for way in ways]
    for ranks in measure(2, cases).values():
        for numbers in ranks:
            check_training(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_four_processes(measure: Measure, variant: str) -> None:
    training = [f"train:{variant}:{how}" for how in ("fsdp", "dp", "hsdp", "sp", "sp2", "hsdp-sp2")]
    sampling = [f"sample:{variant}:{how}:{sampler}" for how in ("sp", "sp2", "hsdp") for sampler in ("iddpm", "flow")]
    others = [f"rest:{variant}:{how}" for how in ("sp2", "hsdp")]
    blocks = [f"blocks:{variant}:{how}" for how in ("fsdp", "hsdp", "sp2", "hsdp-sp2")]
    results = measure(4, [*training, *sampling, *others, *blocks])
    for case in training:
        for numbers in results[case]:
            check_training(numbers)
    for case in sampling:
        for numbers in results[case]:
            assert numbers["video"] < LIMIT < numbers["moved"], case
    for case in others:
        for numbers in results[case]:
            check_rest(numbers)
    for case in blocks:
        for numbers in results[case]:
            check_blocks(numbers)


@pytest.mark.slow
def test_checkpoints_load_on_any_number_of_processes(measure: Measure, tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes: the losses, and the average, of a run on one."""
    found: Numbers = {}
    for processes, case in ((1, "fsdp:0:2"), (2, "sp:2:4"), (4, "sp2:4:6"), (1, "fsdp:6:8")):
        ((numbers, *others),) = measure(processes, [f"resume:{tmp_path}:{case}"]).values()
        assert all(other == numbers for other in others)
        found |= numbers
    ((expected,),) = measure(1, [f"resume:{tmp_path / 'whole'}:fsdp:0:8"]).values()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=LIMIT), name


def test_groups_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="replicate is 3, which does not divide 8 processes: use 1 or 2 or 4 or 8"):
        ParallelDims(8, replicate=3)
    with pytest.raises(ConfigError, match="sequence is 0"):
        ParallelDims(8, sequence=0)
    with pytest.raises(ConfigError, match="3 processes per clip do not divide 16 heads"):
        ParallelDims(6, sequence=3).check("dit", 16, frames=16)
    with pytest.raises(ConfigError, match="4 processes per clip, but it has 2 frames of tokens"):
        ParallelDims(4, sequence=4).check("seq", 16, frames=2)
    with pytest.raises(ConfigError, match="global batch of 6 is not a multiple of the 4 data-parallel ranks"):
        ParallelDims(8, sequence=2).check("seq", 16, frames=16, global_batch=6)
    ParallelDims(6, sequence=3).check("seq", 16, frames=16, global_batch=6)  # padded
