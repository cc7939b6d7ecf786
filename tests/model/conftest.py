"""What the model's tests share: the golden files, small models with every weight in use, and a measure of equality."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stdit_model import STDiT

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    """A golden file: what a reference release computed on random weights."""

    config: dict[str, Any]
    weights: dict[str, Tensor]  # by the release's own names
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    def forward_inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs[key] for key in ("x", "timestep", "y", "mask"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Read a golden file by its name."""

    def read(name: str) -> Golden:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
        parts = [
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("weights.", "input.", "expected.")
        ]
        return Golden(config, *parts)

    return read


@pytest.fixture(scope="session")
def relative() -> Callable[[Tensor, Tensor], float]:
    """The largest difference over the largest value."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def tiny() -> Callable[..., STDiT]:
    """A small model of any variant, every weight random, so that no branch is silent."""

    def make(variant: str = "seq", seed: int = 0, **overrides: Any) -> STDiT:
        generator = torch.Generator().manual_seed(seed)
        config = {"depth": 2, "hidden_size": 48, "num_heads": 4, "caption_channels": 24, "model_max_length": 12}
        model = STDiT(variant=variant, **{**config, **overrides})
        for tensor in model.state_dict().values():
            tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[Tensor, ...]]:
    """x, timestep, y and mask for a `tiny` model."""

    def make(shape: tuple[int, ...] = (2, 4, 3, 8, 8), text: int = 12, channels: int = 24) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        mask = torch.arange(text)[None] < torch.randint(1, text + 1, (shape[0], 1), generator=generator)
        return (
            torch.randn(shape, generator=generator),
            torch.randint(0, 1000, (shape[0],), generator=generator),
            torch.randn((shape[0], text, channels), generator=generator),
            mask,
        )

    return make
