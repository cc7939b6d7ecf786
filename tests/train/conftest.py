"""Small real parts: an untrained VAE, the word-level tokenizer and the T5 of the demo."""

from pathlib import Path

import pytest
import torch

from stdit_data.datasets.shapes import vocabulary
from stdit_model import STDiT
from stdit_train.config.load import load_stage
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.demo.autoencoder import AutoencoderConfig, build_autoencoder
from stdit_train.demo.text import build_text_encoder, build_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vae`, `text_encoder` and `tokenizer`."""
    folder = tmp_path_factory.mktemp("parts")
    vae = build_autoencoder(AutoencoderConfig(block_out_channels=(8, 8, 8, 8)))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(folder / "vae")
    tokenizer = build_tokenizer(vocabulary(), 16)
    tokenizer.save_pretrained(folder / "tokenizer")
    build_text_encoder(len(tokenizer), width=32).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def small(parts: Path) -> TrainConfig:
    """The demo stage, shrunk to seconds."""
    return load_stage(
        "demo",
        {
            "steps": 6,
            "global_batch": 4,
            "log_every": 1,
            "validate_every": 100,
            "sample_every": 100,
            "checkpoint_every": 3,
            "model.depth": 2,
            "model.hidden_size": 32,
            "data.frames": 4,
            "data.height": 16,
            "data.width": 16,
            "data.clips": 10,
            "data.vae": str(parts),
            "data.text_encoder": str(parts),
            "sampling.steps": 2,
            "optimizer.warmup": 0,
        },
    )


@pytest.fixture
def few_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on 8 clips, for tests of something else: 64 take longer to encode than `small` to train on its own."""
    for module in ("stdit_train.loss.batch", "stdit_train.loss.validation"):
        monkeypatch.setattr(f"{module}.VALIDATION_CLIPS", 8)


@pytest.fixture
def base(small: TrainConfig, tmp_path: Path) -> Path:
    """A folder with a transformer of `small`, every weight random, to be adapted."""
    model = STDiT(**model_arguments(small, 4, 32))
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path / "base" / "transformer")
    return tmp_path / "base"
