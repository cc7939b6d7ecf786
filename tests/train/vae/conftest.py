"""A VAE's run, shrunk to seconds."""

from pathlib import Path

import pytest
import torch

from stdit_train.config.load import load_stage
from stdit_train.config.schema import TrainConfig

torch.set_num_threads(1)


class Features(torch.nn.Module):
    """Two feature maps, as a user's network may give them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 4, 3, 2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = torch.relu(self.first(x))
        return [y, self.second(y)]


@pytest.fixture(scope="session")
def features_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("features") / "features.pt"
    torch.jit.save(torch.jit.script(Features()), str(file))
    return file


@pytest.fixture
def tiny_image() -> TrainConfig:
    """Single frames of 16 pixels."""
    return load_stage(
        "vae-demo-image",
        {
            "steps": 6,
            "global_batch": 4,
            "log_every": 1,
            "validate_every": 100,
            "sample_every": 100,
            "checkpoint_every": 3,
            "data.height": 16,
            "data.width": 16,
            "data.clips": 10,
            "vae.channels": [8, 8],
            "vae.groups": 4,
            "optimizer.warmup": 0,
        },
    )


@pytest.fixture
def tiny_video() -> TrainConfig:
    """Clips of 5 frames of 16 pixels with single frames among them, and every term of the loss but the features."""
    return load_stage(
        "vae-demo-video",
        {
            "init": None,
            "steps": 6,
            "global_batch": 2,
            "log_every": 1,
            "validate_every": 100,
            "sample_every": 100,
            "checkpoint_every": 3,
            "data.frames": 5,
            "data.height": 16,
            "data.width": 16,
            "data.clips": 10,
            "data.single_frames": 0.5,
            "vae.temporal": 2,
            "vae.channels": [8, 8],
            "vae.groups": 4,
            "vae.discriminator": "3d",
            "vae.discriminator_start": 2,
            "vae.discriminator_channels": 8,
            "vae.discriminator_layers": 1,
            "optimizer.warmup": 0,
        },
    )
