"""The README's five lines and the docs' loop run as they stand, on small weights of the same layouts."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from stdit_model import STDiT

ROOT = Path(__file__).parents[2]


def code_of(path: str) -> str:
    """The first Python block of a document."""
    block, *_ = re.findall(r"```python\n(.+?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.mark.filterwarnings("ignore:.*null caption")
def test_readme(hub_cache) -> None:
    code = code_of("packages/stdit-model/README.md")
    assert len([line for line in code.splitlines() if line]) == 5
    pixart = PixArtTransformer2DModel(
        num_attention_heads=1, cross_attention_dim=72, num_layers=2, sample_size=64, caption_channels=4096
    )
    pixart.save_pretrained(hub_cache("PixArt-alpha/PixArt-XL-2-512x512") / "transformer")
    names: dict = {}
    exec(code, names)
    assert names["output"].shape == (1, 8, 16, 32, 32)
    assert names["output"].abs().max() > 0


def test_docs_weights(tmp_path, monkeypatch, capsys) -> None:
    model = STDiT(depth=1, hidden_size=72, num_heads=1, caption_channels=8)
    save_file(model.state_dict(), tmp_path / "OpenSora-v1-HQ-16x512x512.pth")
    monkeypatch.chdir(tmp_path)
    exec(code_of("docs/weights.md"), {"torch": torch})
    assert len(capsys.readouterr().out.splitlines()) == len(model.state_dict())
