"""Training a part of a model: an adapter, or the temporal attention. The rest is frozen, and in no checkpoint."""

import importlib.util
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stdit_model import STDiT
from stdit_model.errors import SettingsError
from stdit_model.weights.adapters import load_adapters
from stdit_model.weights.folders import LORA_FILE
from stdit_model.weights.lora import read_lora
from stdit_train.adapters import build_partial, frozen_bytes, trained_parameters, weights_sha256
from stdit_train.build import open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.format import named_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import from_dict, load_curriculum, load_stage, set_values, to_dict
from stdit_train.config.resolve import resolve_config
from stdit_train.config.schema import TrainConfig, model_arguments
from stdit_train.errors import ConfigError
from stdit_train.estimate.plan import plan_stage
from stdit_train.estimate.training import describe, estimate_run
from stdit_train.hardware import DEVICES
from stdit_train.pipeline.export import export_run
from stdit_train.pipeline.find import find_checkpoint
from stdit_train.trainer import Trainer


@pytest.fixture
def config(small: TrainConfig, base: Path) -> TrainConfig:
    """The small stage with an adapter; `part` of other tests replaces it."""
    return changed(small, init=str(base), **{"lora.rank": 2, "lora.alpha": 4, "optimizer.ema": 0.5})


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return from_dict(set_values(to_dict(config), values))


def trained(config: TrainConfig, folder: Path) -> Trainer:
    trainer = open_trainer(config, config, RunFolder(folder), NullCallback())
    assert trainer.train().finished
    return trainer


def outputs(model: STDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 4, 2, 2, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return model.eval()(x, torch.tensor([300.0, 700.0]), y)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_adapter(config: TrainConfig, base: Path, tmp_path: Path, optimizer: str) -> None:
    config = changed(config, **{"optimizer.name": optimizer})
    trainer = trained(config, tmp_path / "run")
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    # The average shares what is frozen, and checkpoints hold the rest alone.
    tensors = named_tensors(trainer.model, trainer.ema.model, trainer.optimizers)
    kept = {name for name in tensors if ".lora_" not in name}
    assert kept == {"model.y_embedder.y_embedding", "ema.y_embedder.y_embedding"}
    assert len(tensors) > 4 * 2 * 2 * 5  # model, ema and optimizer; 2 blocks; A and B
    pairs = zip(trainer.model.named_parameters(), trainer.ema.model.parameters(), strict=True)
    assert all((".lora_" not in name) == (ours is average) for (name, ours), average in pairs)
    # What is published is the average, in diffusers' format.
    tensors, metadata = read_lora(tmp_path / "run" / LORA_FILE)
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 4)
    loaded = STDiT.from_pretrained(base / "transformer")
    plain = outputs(loaded)
    load_adapters(loaded, [(str(tmp_path / "run"), 1.0)])
    assert torch.equal(outputs(loaded), outputs(trainer.ema.model))
    assert not torch.equal(outputs(loaded), plain)
    with pytest.raises(ConfigError, match="run holds a LoRA adapter: give it with --lora"):
        find_checkpoint(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds a LoRA adapter: merge it into its model first"):
        trained(changed(config, init=str(tmp_path / "run")), tmp_path / "next")


def test_the_temporal_attention(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    config = changed(config, trained_weights="temporal", **{"lora.rank": None, "lora.alpha": None})
    trainer = trained(config, tmp_path / "run")
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    published = STDiT.from_pretrained(tmp_path / "run" / "pipeline" / "transformer")
    for name, tensor in published.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".attn_temp." not in name), name
    assert torch.equal(outputs(published), outputs(trainer.ema.model))
    names = named_tensors(trainer.model, trainer.ema.model, trainer.optimizers)
    assert all(".attn_temp." in name or "y_embedding" in name for name in names)


@pytest.mark.parametrize(
    "part", [{"lora.rank": 2}, {"trained_weights": "temporal", "lora.rank": None, "lora.alpha": None}]
)
def test_frozen_weights_in_bfloat16(config: TrainConfig, tmp_path: Path, part: dict[str, Any]) -> None:
    config = changed(config, frozen="bf16", precision="bf16", steps=2, **part)
    trainer = trained(config, tmp_path / "run")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    for name, weight in trainer.model.named_parameters():
        spared = any(part in name for part in ("t_embedder", "t_block", "scale_shift_table"))
        assert weight.dtype == (torch.float32 if weight.requires_grad or spared else torch.bfloat16), name
    if config.lora.rank is None:
        weights = load_file(tmp_path / "run" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        weights = load_file(tmp_path / "run" / LORA_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def stored(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a weight: in 8 bits, the integers and their scales."""
    if type(weight) is torch.nn.Parameter:
        return [weight.detach().clone()]
    return [getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]]  # type: ignore[attr-defined]


def test_frozen_weights_in_8_bits(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    """The loss falls, what is frozen stays as it was rounded, and a run that resumes goes on to the bit."""
    pytest.importorskip("torchao", reason="extra int8 of stdit-train")
    config = changed(
        config, frozen="int8", precision="bf16", steps=8, **{"optimizer.name": "adamw", "optimizer.lr": 0.01}
    )
    model, digest = build_partial(config, 4, 32)
    before = {name: stored(weight) for name, weight in model.named_parameters() if not weight.requires_grad}
    in_8_bits = {name for name, (first, *_) in before.items() if first.dtype == torch.int8}
    assert in_8_bits == {name for name in before if name.startswith("blocks.") and name.endswith("weight")}
    kept = {name for name, (first, *_) in before.items() if first.dtype == torch.float32}
    assert kept == {name for name in before if "t_embedder" in name or "t_block" in name or "scale_shift_table" in name}
    plain = STDiT.from_pretrained(base / "transformer")
    assert digest == weights_sha256(plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model).float()
    assert 0 < (found - outputs(plain)).norm() / outputs(plain).norm() < 0.05

    whole = open_trainer(config, config, RunFolder(tmp_path / "whole"), NullCallback())
    loss = whole.outputs.validate()["validation_loss"]
    assert whole.train().finished
    assert whole.outputs.validate()["validation_loss"] < 0.98 * loss
    for name, weight in whole.model.named_parameters():
        if not weight.requires_grad:
            assert all(map(torch.equal, stored(weight), before[name])), name
    tensors = named_tensors(whole.model, whole.ema.model, whole.optimizers)
    assert all(".lora_" in name or "y_embedding" in name for name in tensors)

    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(RunFolder(tmp_path / "half").latest_checkpoint().path)  # type: ignore[union-attr]
    (tmp_path / "half" / LORA_FILE).unlink()
    assert open_trainer(config, config, RunFolder(tmp_path / "half"), NullCallback()).step == 6
    trained(config, tmp_path / "half")
    again, adapter = (load_file(tmp_path / name / LORA_FILE) for name in ("half", "whole"))
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    count = sum(part.nbytes for weight in before.values() for part in weight)
    assert frozen_bytes(config, model_arguments(config, 4, 32)) == count


def test_8_bits_without_torchao(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with pytest.raises(ConfigError, match="frozen=int8 needs torchao: run `uv sync --extra int8`"):
        build_partial(changed(config, frozen="int8", precision="bf16"), 4, 32)


def test_other_frozen_weights_are_refused(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    trained(replace(config, steps=3), tmp_path / "run")
    changed_base = STDiT.from_pretrained(base / "transformer")
    changed_base.final_layer.linear.bias.data += 1e-3
    changed_base.save_pretrained(base / "transformer")
    with pytest.raises(ConfigError, match=f"the weights of {base} are others than when .*run began"):
        trained(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=f"the weights of {base} are others"):
        export_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "out"))


def test_export(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    trainer = trained(config, tmp_path / "run")
    assert export_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "out"), step=6) == 6
    assert [file.name for file in (tmp_path / "out").iterdir()] == [LORA_FILE]
    exported, published = (load_file(tmp_path / name / LORA_FILE) for name in ("out", "run"))
    assert all(torch.equal(exported[name], published[name]) for name in published)
    export_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "raw"), raw=True)
    loaded = STDiT.from_pretrained(base / "transformer")
    load_adapters(loaded, [(str(tmp_path / "raw"), 1.0)])
    assert torch.equal(outputs(loaded), outputs(trainer.model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora.rank": 4}, r"--lora needs a trained model: give it with --init, e\.g\. --init demo"),
        ({"lora.rank": 0, "init": "demo"}, r"lora\.rank: .* greater than or equal to 1, not 0"),
        ({"trained_weights": "temporal"}, "--train temporal needs a trained model"),
        ({"trained_weights": "spatial", "init": "demo"}, "trained_weights: input should be 'all' or 'temporal'"),
        (
            {"lora.rank": 4, "trained_weights": "temporal", "init": "demo"},
            "--lora trains an adapter alone, .*: give one",
        ),
        ({"lora.modules": ["attn"]}, "give its rank, e.g. --lora 16"),
        ({"lora.rank": 4, "init": "demo", "sequence": 2}, "leave out sequence and replicate"),
        ({"lora.rank": 4, "init": "demo", "precision": "bf16-weights"}, "take precision=bf16, with frozen=bf16"),
        ({"lora.rank": 4, "init": "demo", "frozen": "bf16"}, "set precision=bf16, not fp32"),
        ({"frozen": "bf16"}, "frozen=bf16 is for --lora and --train temporal"),
        (
            {"trained_weights": "temporal", "init": "demo", "frozen": "int8", "precision": "bf16"},
            "--train temporal publishes all weights, which frozen=int8 has rounded: take frozen=bf16",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_stage("demo", settings)
    assert "\n" not in str(caught.value)


def test_modules_that_a_model_lacks_are_told_before_anything_is_loaded() -> None:
    config = load_stage("demo", {"lora.rank": 4, "init": "demo", "lora.modules": ["atn"]})
    with pytest.raises(SettingsError, match=r"no linear layer is in 'atn' of this model \(the nearest is attn\)"):
        estimate_run(config)
    config = load_stage("demo", {"trained_weights": "temporal", "init": "demo", "model.variant": "dit"})
    with pytest.raises(ConfigError, match="the variant dit has no temporal attention"):
        estimate_run(config)


def test_settings_of_older_runs_are_read() -> None:
    saved = to_dict(load_stage("demo"))
    for key in ("lora", "trained_weights", "frozen"):
        del saved[key]
    assert from_dict(saved) == load_stage("demo")


def test_components_are_those_of_the_pipeline(tmp_path: Path) -> None:
    (tmp_path / "pipe" / "vae").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text('{"_hub_components": {"text_encoder": "me/t5"}}')
    for init, found in (("demo", ("demo", "demo")), (str(tmp_path / "pipe"), (str(tmp_path / "pipe"), "me/t5"))):
        settings = {"lora.rank": 4, "init": init, "data.source": "clips"}
        data = resolve_config(load_stage("16x256", settings), settings).data
        assert (data.vae, data.text_encoder) == found
    named = {**settings, "data.vae": "me/vae"}
    assert resolve_config(load_stage("16x256", named), named).data.vae == "me/vae"
    whole = {"init": "demo", "data.source": "clips"}
    assert resolve_config(load_stage("16x256", whole), whole).data.vae == "stabilityai/sd-vae-ft-ema"


def test_all_stages_of_a_curriculum_adapt_the_same_model() -> None:
    stages = load_curriculum("open-sora-1.0", {"init": "weights.pth"})
    assert {stage.init for stage in stages[1:]} == {None}
    stages = load_curriculum("open-sora-1.0", {"init": "weights.pth", "lora.rank": 8})
    assert {stage.init for stage in stages} == {"weights.pth"}


@pytest.mark.parametrize(
    "part",
    [
        {"lora.rank": 4},
        {"lora.rank": 3, "lora.modules": ["mlp", "cross_attn.kv_linear"]},
        {"trained_weights": "temporal"},
    ],
)
def test_the_estimate_counts_what_is_trained(config: TrainConfig, part: dict[str, Any], tmp_path: Path) -> None:
    config = changed(config, **{"lora.rank": None, "lora.alpha": None, "steps": 1, **part})
    trainer = open_trainer(config, config, RunFolder(tmp_path / "run"), NullCallback())
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained_parameters(config, model_arguments(config, 4, 32)) == count
    estimate = estimate_run(config)
    assert estimate.trained_parameters == count
    assert estimate.memory["optimizer"] == 4 * count == estimate.memory["gradients"] == estimate.memory["EMA"]  # Muon


def test_a_plan_of_an_adapter() -> None:
    settings = {"init": "demo", "lora.rank": 16, "micro_batch": 8}
    whole, adapter = load_stage("16x512"), load_stage("16x512", settings)
    half = load_stage("16x512", {**settings, "frozen": "bf16"})
    (plan,) = plan_stage(adapter, DEVICES["h100"], 8)
    assert (plan.how, plan.default) == ("a copy on each", True)
    trained = plan.estimate.trained_parameters
    assert plan.sent.total == plan.sent.summed == 8 * trained * 7 // 8
    full = estimate_run(replace(whole, micro_batch=8), 2**50)
    assert trained < full.parameters / 50
    assert plan.estimate.memory["optimizer"] == 8 * trained
    saved = plan.estimate.memory["weights"] - plan_stage(half, DEVICES["h100"], 8)[0].estimate.memory["weights"]
    shapes = STDiT.parameter_shapes(**model_arguments(adapter, 4, 4096))
    spared = [name for name in shapes if re.search(r"t_embedder|t_block|scale_shift_table", name)]
    assert saved == 2 * (full.parameters - sum(math.prod(shapes[name]) for name in spared))
    eighth = load_stage("16x512", {**settings, "frozen": "int8"})
    assert 0.4 < estimate_run(eighth).memory["weights"] / estimate_run(half).memory["weights"] < 0.6
    assert plan.estimate.step_flops < 0.75 * full.step_flops
    assert any(f"frozen; {trained:,} are trained, an adapter of rank 16" in line for line in describe(plan.estimate))
