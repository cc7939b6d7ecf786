"""docs/real-weights.md, step by step, on tiny files of the same layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from PIL import Image
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stdit_data.video.read import read_video
from stdit_model import STDiT
from stdit_model.embed import spatial_positions, temporal_positions

SIZES: dict[str, Any] = {"depth": 2, "hidden_size": 72, "num_heads": 1, "caption_channels": 32, "model_max_length": 12}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The folder that step 1 leaves."""
    torch.manual_seed(0)
    folder = tmp_path / "weights"
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(folder / "sd-vae-ft-ema")  # fmt: skip
    text = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5EncoderModel(text).save_pretrained(folder / "t5-v1_1-xxl")
    ByT5Tokenizer().save_pretrained(folder / "t5-v1_1-xxl")
    model = STDiT(**SIZES)
    for block in model.blocks:  # nothing is zero after training
        torch.nn.init.normal_(block.attn_temp.proj.weight, std=0.1)
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    tensors = dict(model.state_dict())
    pixart = {name: tensor for name, tensor in tensors.items() if ".attn_temp." not in name}
    pixart["x_embedder.proj.weight"] = pixart["x_embedder.proj.weight"].squeeze(2)
    pixart["pos_embed"] = spatial_positions(72, 2, 2, 1.0)[None]
    torch.save({"state_dict": pixart}, folder / "PixArt.pth")
    tensors["pos_embed"] = spatial_positions(72, 2, 2, 1.0)[None]
    tensors["pos_embed_temporal"] = temporal_positions(72, 4, 1.0)[None]
    torch.save(tensors, folder / "OpenSora.pth")
    return folder


PARTS = ["--vae", "weights/sd-vae-ft-ema", "--text-encoder", "weights/t5-v1_1-xxl"]


def test_open_sora(stdit: Callable, tmp_path: Path, weights: Path) -> None:
    done = stdit("weights", "inspect", "weights/OpenSora.pth")
    for said in (
        "STDiT",
        "depth 2, width 72",
        "with learned variance",
        "space_scale 1, time_scale 1",
        "every tensor fits",
    ):
        assert said in done.out, done
    sample = ["sample", "a turtle", "--checkpoint", "weights/OpenSora.pth", *PARTS]
    done = stdit(*sample, "--compat", "open-sora-1.0", "--low-memory", "--steps", "3", "--out", "a.mp4")
    assert done.code == 0, done
    assert "warning" not in done.out
    assert read_video(str(tmp_path / "a.mp4"), 32, 32)[0].shape == (3, 4, 32, 32)

    done = stdit("weights", "convert", "weights/OpenSora.pth", "open-sora", *PARTS, "--tokenizer", PARTS[-1])
    assert done.code == 0, done
    again = ["sample", "a turtle", "--checkpoint", "open-sora", "--compat", "open-sora-1.0", "--steps", "3"]
    assert stdit(*again, "--out", "b.mp4").code == 0
    one, other = (read_video(str(tmp_path / name), 32, 32)[0] for name in ("a.mp4", "b.mp4"))
    assert torch.equal(one, other)
    done = stdit("weights", "convert", "open-sora", "back.pth")
    back, file = (torch.load(path, weights_only=True) for path in (tmp_path / "back.pth", weights / "OpenSora.pth"))
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)


def test_pixart(stdit: Callable, tmp_path: Path, weights: Path) -> None:
    arguments = ["--checkpoint", "weights/PixArt.pth", *PARTS, "--sampler", "dpmsolver++", "--steps", "3"]
    done = stdit("sample", "a cactus", *arguments)
    assert done.code == 0, done
    assert Image.open(tmp_path / "videos" / "a-cactus-0.png").size == (32, 32)


def test_pixart_of_diffusers_is_the_same_with_low_memory(stdit: Callable, tmp_path: Path, weights: Path) -> None:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=72, num_layers=1, cross_attention_dim=72, sample_size=8,
        caption_channels=32, patch_size=2, out_channels=8, in_channels=4, norm_num_groups=1, attention_bias=True,
        use_additional_conditions=False,
    )  # fmt: skip
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    model.save_pretrained(weights / "pixart")
    sample = ["sample", "a red fox", "--checkpoint", "weights/pixart", *PARTS, "--steps", "2"]
    plain = stdit(*sample, "--out", "plain.png")
    sparing = stdit(*sample, "--low-memory", "--out", "sparing.png")
    assert plain.code == sparing.code == 0, (plain, sparing)
    assert "null caption" not in plain.err + sparing.err
    pictures = (torch.tensor(np.asarray(Image.open(tmp_path / name))) for name in ("plain.png", "sparing.png"))
    assert torch.equal(*pictures)


def test_what_is_missing_is_told_with_its_remedy(stdit: Callable, weights: Path) -> None:
    done = stdit("sample", "a cat", "--checkpoint", "weights/OpenSora.pth")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    for said in ("stabilityai/sd-vae-ft-ema", "DeepFloyd/t5-v1_1-xxl", "hf download", "--vae", "--text-encoder"):
        assert said in done.err
