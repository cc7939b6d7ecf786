"""LoRA adapters: in diffusers' format, loaded beside each other, weighted, merged; other files are refused by name."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from stdit_model import STDiT, STDiTPipeline
from stdit_model.errors import SettingsError, WeightsError, WeightsFileNotFoundError
from stdit_model.sampling.folder import write_pipeline
from stdit_model.weights.adapters import load_adapters, merge_adapters
from stdit_model.weights.find_lora import find_lora
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.lora import choose_modules, read_lora

peft = pytest.importorskip("peft", reason="adapters are the extra `lora` of stdit-model")


@pytest.fixture
def adapter(tiny, tmp_path):
    """Write an adapter of `tiny`, every weight random, as diffusers' training scripts do."""

    def write(name="lora", seed=0, rank=4, alpha=8, modules=("attn.qkv", "cross_attn.kv_linear"), **overrides):
        model = tiny(**overrides)
        model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        STDiTPipeline.save_lora_weights(
            tmp_path / name,
            transformer_lora_layers=peft.get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        return tmp_path / name / LORA_FILE

    return write


def pipeline(model: STDiT) -> STDiTPipeline:
    return STDiTPipeline(model, AutoencoderKL(), None, None, FlowMatchEulerDiscreteScheduler())


def updated(model: STDiT, file, scale: float, alpha: float = 8.0) -> STDiT:
    """The formula by hand: W + scale * alpha / r * B A."""
    tensors = load_file(file)
    weights = dict(model.named_parameters())
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            update = tensors[name.replace("lora_A", "lora_B")] @ a
            weights[f"{module}.weight"].data += scale * alpha / len(a) * update
    return model


@torch.no_grad()
def test_pipeline_loads_weighs_and_unloads(adapter, tiny, inputs, relative) -> None:
    first, second = adapter("one", seed=1), adapter("two", seed=2, rank=2, modules=["attn_temp.proj", "mlp.fc1"])
    pipe = pipeline(tiny())
    x = inputs()
    plain = pipe.transformer(*x)
    pipe.load_lora_weights(first.parent, adapter_name="one")
    assert relative(pipe.transformer(*x), updated(tiny(), first, 1.0)(*x)) < 1e-5
    assert relative(pipe.transformer(*x), plain) > 1e-2
    pipe.load_lora_weights(str(second), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -2.0])
    both = updated(updated(tiny(), first, 0.5), second, -2.0)
    assert relative(pipe.transformer(*x), both(*x)) < 1e-5
    cached = pipe.transformer.encode_text(*x[2:])  # text keys and values are adapted, too
    assert torch.equal(pipe.transformer(*x[:2], cached), pipe.transformer(*x))
    pipe.unload_lora_weights()
    assert torch.equal(pipe.transformer(*x), plain)


@torch.no_grad()
def test_merge(adapter, tiny, inputs, relative) -> None:
    loras = [(str(adapter("one", seed=1)), 0.5), (str(adapter("two", seed=2).parent), 1.0)]
    x, merged = inputs(), tiny()
    merge_adapters(merged, loras)
    expected = updated(updated(tiny(), loras[0][0], 0.5), loras[1][0] + f"/{LORA_FILE}", 1.0)
    assert merged.state_dict().keys() == tiny().state_dict().keys()
    assert relative(merged(*x), expected(*x)) < 1e-5
    beside = tiny()
    assert [file.name for file in load_adapters(beside, loras)] == [LORA_FILE] * 2
    assert relative(beside(*x), expected(*x)) < 1e-5


@torch.no_grad()
def test_merge_into_pipeline_folder(adapter, tiny, inputs, relative, tmp_path) -> None:
    pipeline(tiny()).save_pretrained(tmp_path / "pipeline")
    file = adapter()
    write_pipeline(tmp_path / "pipeline", tmp_path / "merged", loras=[(str(file), 1.0)])
    merged = STDiT.from_pretrained(tmp_path / "merged" / "transformer")
    assert relative(merged(*inputs()), updated(tiny(), file, 1.0)(*inputs())) < 1e-5


@torch.no_grad()
def test_without_metadata_alpha_is_the_rank(adapter, tiny, inputs, relative, tmp_path) -> None:
    file = adapter()
    save_file(load_file(file), tmp_path / "bare.safetensors")
    pipe = pipeline(tiny())
    pipe.load_lora_weights(load_file(file))
    expected = updated(tiny(), file, 1.0, alpha=4.0)(*inputs())
    assert relative(pipe.transformer(*inputs()), expected) < 1e-5
    model = tiny()
    load_adapters(model, [(str(tmp_path / "bare.safetensors"), 1.0)])
    assert relative(model(*inputs()), expected) < 1e-5


def test_another_models_adapter_is_refused(adapter, tiny, tmp_path) -> None:
    model, file = tiny(), adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases = {
        r"another size: blocks.0.attn.qkv is \[72, 24\] there, \[144, 48\] in this model": adapter("s", hidden_size=24),
        r"no linear layer blocks.2.attn.qkv, .* \(the nearest is blocks.": adapter("deep", depth=3),
    }

    def spoilt(name, change):
        tensors = change(load_file(file))
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    key = "transformer.blocks.0.attn.qkv.lora_A.weight"
    cases |= {
        "not a LoRA of a transformer in diffusers' format.* it has unet.q": spoilt(
            "unet.safetensors", lambda t: {"unet.q": t[key]}
        ),
        "has one of lora_A and lora_B of blocks.0.attn.qkv": spoilt(
            "half.safetensors", lambda t: {k: v for k, v in t.items() if k != key}
        ),
        "attn.qkv has values that are not finite": spoilt(
            "nan.safetensors", lambda t: {k: v * float("nan") if k == key else v for k, v in t.items()}
        ),
    }
    (tmp_path / "text.safetensors").write_text("no tensors here")
    cases["not a readable adapter in safetensors format"] = tmp_path / "text.safetensors"
    for message, path in cases.items():
        with pytest.raises(WeightsError, match=message) as caught:
            load_adapters(model, [(str(path), 1.0)])
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        with pytest.raises(WeightsError):
            pipeline(model).load_lora_weights(path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_metadata_is_checked(adapter, tiny, tmp_path) -> None:
    file = adapter()
    tensors, metadata = read_lora(file)
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8)
    for key, value, message in (
        ("r", 8, r"metadata has rank 8, its tensors \[4\]"),
        ("r", "four", "r 'four', which makes no sense"),
        ("lora_alpha", None, "lora_alpha None"),
    ):
        spoilt = {"lora_adapter_metadata": json.dumps(metadata | {f"transformer.{key}": value})}
        save_file(tensors, tmp_path / "spoilt.safetensors", spoilt)
        with pytest.raises(WeightsError, match=message):
            load_adapters(tiny(), [(str(tmp_path / "spoilt.safetensors"), 1.0)])


def test_metadata_imports_nothing(adapter, tiny, tmp_path) -> None:
    """peft imports the module that a configuration names as `megatron_core`."""
    tensors, metadata = read_lora(adapter())
    metadata |= {"transformer.megatron_config": {"a": 1}, "transformer.megatron_core": "antigravity"}
    save_file(tensors, tmp_path / "odd.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    load_adapters(tiny(), [(str(tmp_path / "odd.safetensors"), 1.0)])
    assert "antigravity" not in sys.modules


def test_find(adapter, tmp_path, hub_cache) -> None:
    file = adapter()
    assert find_lora(file) == find_lora(file.parent) == file
    with pytest.raises(WeightsFileNotFoundError, match=r"no pytorch_lora_weights\.safetensors in this folder"):
        find_lora(tmp_path)
    with pytest.raises(WeightsFileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        find_lora("nowhere.safetensors")
    (hub_cache("me/lora") / LORA_FILE).write_bytes(file.read_bytes())
    assert find_lora("me/lora").read_bytes() == file.read_bytes()
    with pytest.raises(WeightsError, match=f"hf download me/other {LORA_FILE}"):
        find_lora("me/other")


def test_choose_modules(tiny) -> None:
    model = tiny()
    assert choose_modules(["attn", "cross_attn.kv_linear"], model) == ["attn.qkv", "attn.proj", "cross_attn.kv_linear"]
    assert choose_modules(["final_layer", "mlp"], model) == ["final_layer.linear", "mlp.fc1", "mlp.fc2"]
    with pytest.raises(SettingsError, match=r"no linear layer is in 'atn_temp'.* \(the nearest is attn_temp"):
        choose_modules(["atn_temp"], model)
    with pytest.raises(SettingsError, match=r"'attn_temp' of this model \(the nearest is attn\)"):
        choose_modules(["attn_temp"], tiny("dit"))


def test_without_peft(adapter, tiny, monkeypatch) -> None:
    file = adapter()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--lora needs peft: run `uv sync --extra lora`, or pip install"):
        load_adapters(tiny(), [(str(file), 1.0)])
    with pytest.raises(SettingsError, match="load_lora_weights needs peft"):
        pipeline(tiny()).load_lora_weights(file)
