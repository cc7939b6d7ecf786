"""`--lora` of `stdit sample` and `stdit weights merge`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from stdit_cli.commands.sample.request import parse_adapter
from stdit_model import STDiT, STDiTPipeline
from stdit_model.weights.folders import LORA_FILE
from stdit_train.assets import demo_folder
from stdit_train.errors import ConfigError

PROMPT = ("sample", "a red circle moving left", "--steps", 2, "--format", "frames")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the demo whose update is large."""
    model = STDiT.from_pretrained(demo_folder() / "transformer")
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["attn.qkv", "mlp.fc2"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    STDiTPipeline.save_lora_weights(
        tmp_path / "adapter",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return tmp_path / "adapter" / LORA_FILE


def frames(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob("*.png"))]


def test_sample_with_adapters(stdit: Callable, tmp_path: Path, adapter: Path) -> None:
    assert stdit(*PROMPT, "--out", "plain").code == 0
    assert stdit(*PROMPT, "--out", "zero", "--lora", f"{adapter}:0").code == 0
    assert frames(tmp_path / "zero") == frames(tmp_path / "plain")
    done = stdit(*PROMPT, "--out", "adapted", "--lora", f"{adapter}:0.5", "--lora", "adapter")
    assert done.code == 0, done.err
    assert frames(tmp_path / "adapted") != frames(tmp_path / "plain")
    (sidecar,) = (tmp_path / "adapted").glob("*.json")
    content = json.loads(sidecar.read_text())
    assert content["settings"]["lora"] == [f"{adapter}:0.5", f"{adapter.parent}:1"]
    assert len(set(content["used"]["lora_sha256"])) == 1

    done = stdit("sample", "--from", sidecar, "--out", "again", "--format", "frames")
    assert done.code == 0 and "warning" not in done.out
    assert frames(tmp_path / "again") == frames(tmp_path / "adapted")
    save_file({name: 2 * tensor for name, tensor in load_file(adapter).items()}, adapter)
    assert "an adapter has changed since" in stdit("sample", "--from", sidecar, "--out", "changed").out


def test_merge(stdit: Callable, tmp_path: Path, adapter: Path) -> None:
    done = stdit("weights", "merge", "demo", "merged", "--lora", f"{adapter}:0.5")
    assert (done.code, done.out.endswith("parameters, 1 adapter merged\n")) == (0, True), done.err
    assert stdit(*PROMPT, "--out", "merged-out", "--checkpoint", "merged").code == 0
    merged = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(demo_folder() / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = load_file(adapter)
    changed = {name for name in before if not torch.equal(merged[name], before[name].float())}
    assert changed == {
        name.removeprefix("transformer.").replace(".lora_A", "") for name in tensors if ".lora_A" in name
    }
    name = "transformer.blocks.0.attn.qkv.lora_{}.weight"
    update = 0.5 * tensors[name.format("B")] @ tensors[name.format("A")]
    weight = "blocks.0.attn.qkv.weight"
    expected = before[weight].float() + update
    torch.testing.assert_close(merged[weight].float(), expected, rtol=2**-8, atol=1e-6)  # rounded once, to bfloat16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lora", "none.safetensors"), "none.safetensors: no such file or folder"),
        (("--lora", "none.safetensors:nan"), "--lora none.safetensors:nan: expected FILE or FILE:SCALE"),
        (("--lora", "empty"), "empty: no pytorch_lora_weights.safetensors in this folder, so it holds no adapter"),
        (("--checkpoint", "adapter"), "adapter holds a LoRA adapter: give it with --lora"),
    ],
)
def test_faults_are_one_line(
    stdit: Callable, tmp_path: Path, adapter: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = stdit(*PROMPT, *arguments)
    assert (done.code, done.err.count("\n")) == (2, 1) and said in done.err


def test_parse() -> None:
    assert parse_adapter("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_adapter("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_adapter("a:b:-1") == ("a:b", -1.0)
    assert parse_adapter("C:/a.safetensors") == ("C:/a.safetensors", 1.0)
    for text in (":0.8", "", "a:inf"):
        with pytest.raises(ConfigError, match="expected FILE"):
            parse_adapter(text)
