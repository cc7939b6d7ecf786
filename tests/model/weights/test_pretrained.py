"""Weights out and back: save_pretrained, from_pretrained, push_to_hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stdit_model import VARIANTS, STDiT
from stdit_model.errors import WeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def equal(one: STDiT, other: STDiT) -> bool:
    configs = [{key: value for key, value in model.config.items() if key[0] != "_"} for model in (one, other)]
    states = [model.state_dict() for model in (one, other)]
    assert configs[0] == configs[1]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tiny, tmp_path) -> None:
    model = tiny(variant, space_scale=0.5, patch_size=(2, 2, 2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_class_name"], config["variant"], config["depth"]) == ("STDiT", variant, 2)
    assert equal(STDiT.from_pretrained(tmp_path), model)
    assert equal(STDiT.from_pretrained(str(tmp_path)), model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, None], ids=["plain", "default"])
def test_sharded(low_cpu_mem_usage, tiny, tmp_path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    options = {} if low_cpu_mem_usage is None else {"low_cpu_mem_usage": low_cpu_mem_usage}
    assert equal(STDiT.from_pretrained(tmp_path, **options), model)


def test_options_reach_diffusers(tiny, tmp_path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "inner", variant="fp16")
    loaded, info = STDiT.from_pretrained(
        tmp_path, subfolder="inner", variant="fp16", dtype=torch.bfloat16, output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16
    assert info["missing_keys"] == []
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert equal(STDiT.from_pretrained(tmp_path / "bin", use_safetensors=False), model)
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in it"):
        STDiT.from_pretrained(tmp_path / "bin")


def refused(folder: Path, match: str, error: type[Exception] = WeightsError) -> None:
    with pytest.raises(error, match=match) as caught:
        STDiT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_strict(tiny, tmp_path) -> None:
    tiny().save_pretrained(tmp_path)
    whole = {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items()}  # the file is mapped

    def with_tensors(tensors):
        save_file(tensors, tmp_path / WEIGHTS)
        return tmp_path

    refused(with_tensors({}), "holds no tensors")
    refused(with_tensors({"a.weight": torch.zeros(1)}), r"missing keys \(.*1 unexpected keys \(a.weight\)")
    less = {name: tensor for name, tensor in whole.items() if name != "blocks.1.mlp.fc1.bias"}
    refused(with_tensors(less), r"1 missing keys \(blocks.1.mlp.fc1.bias\)")
    refused(with_tensors(whole | {"pos_embed": torch.zeros(1)}), r"1 unexpected keys \(pos_embed\)")
    reshaped = whole | {"t_block.1.bias": torch.zeros(7)}
    refused(with_tensors(reshaped), r"1 tensors of other shapes \(t_block.1.bias is \[7\], not \[288\]\)")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    refused(tmp_path, "not a readable safetensors file")
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, "no diffusion_pytorch_model.safetensors in it", FileNotFoundError)
    refused(tmp_path / "none", "no such file or folder", FileNotFoundError)
    assert equal(STDiT.from_pretrained(with_tensors(whole)), tiny())


def test_shards_are_looked_into(tiny, tmp_path) -> None:
    """diffusers believes the index; a shard that lost its tensors would leave parameters unset."""
    tiny().save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file({}, shard)
    refused(tmp_path, "the index and its shards differ by")


def test_other_classes_are_refused(tiny, tmp_path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "PixArtTransformer2DModel"}))
    refused(tmp_path, "is of PixArtTransformer2DModel, not of STDiT; read it with STDiT.from_pixart")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 10000}))
    with pytest.raises(WeightsError, match="no argument rope_theta"):
        STDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: not valid JSON")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json in it", FileNotFoundError)


def test_saved_folders_are_not_releases(tiny, tmp_path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"read it with STDiT.from_pretrained"):
        STDiT.from_open_sora(tmp_path)


def test_hub_ids_from_the_cache(tiny, golden, hub_cache, tmp_path) -> None:
    model = tiny()
    snapshot = hub_cache("someone/model")
    model.save_pretrained(snapshot)
    model.save_pretrained(snapshot / "inner")
    torch.save(golden("opensora_v1_stdit_edges").weights, snapshot / "OpenSora.pth")
    assert equal(STDiT.from_pretrained("someone/model", cache_dir=tmp_path), model)
    assert equal(STDiT.from_pretrained("someone/model", cache_dir=tmp_path, subfolder="inner"), model)
    assert equal(STDiT.from_pretrained("someone/model/inner"), model)
    assert STDiT.from_open_sora("someone/model/OpenSora.pth", num_heads=2).config.depth == 2
    hub_cache("someone/notes")
    with pytest.raises(
        WeightsError,
        match=r"no diffusers weights in this Hub repository; .* someone/notes/FILE.pth",
    ):
        STDiT.from_open_sora("someone/notes")


def test_hub_ids_that_are_not_there_offline(tmp_path, monkeypatch, hub_cache) -> None:
    """One line, at once."""
    for read in (STDiT.from_pretrained, STDiT.from_open_sora, STDiT.from_pixart):
        for name in ("nobody/nothing", "nobody/nothing/weights.pth"):
            with pytest.raises(WeightsError, match=f"{name}: no such file or folder, and not available") as caught:
                read(name)
            assert "\n" not in str(caught.value)
            assert "HF_HUB_OFFLINE" in str(caught.value)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("nothing", "weights/model.safetensors", "./a/b", "/a/b", "a b/c", "runs/mine/model.pth"):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(name)}: no such file or folder"):
            STDiT.from_open_sora(name)


def test_push_to_hub(tiny, monkeypatch, tmp_path) -> None:
    """What goes up is a folder that from_pretrained reads."""
    uploaded = tmp_path / "uploaded"

    class Repository:
        repo_id = "me/video"

    def upload(*, repo_id, folder_path, **options):
        assert repo_id == "me/video"
        shutil.copytree(folder_path, uploaded)

    module = "diffusers.utils.hub_utils"
    monkeypatch.setattr(f"{module}.create_repo", lambda *args, **options: Repository())
    monkeypatch.setattr(f"{module}.upload_folder", upload)
    monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *args, **options: None)
    monkeypatch.setattr(f"{module}.populate_model_card", lambda card: Card())
    model = tiny()
    model.push_to_hub("me/video")
    assert equal(STDiT.from_pretrained(uploaded), model)


class Card:
    def save(self, path) -> None:
        Path(path).write_text("model card")


def test_public_module() -> None:
    """Pipelines record a class's module: it must not follow the file it happens to be in."""
    assert STDiT.__module__ == "stdit_model"
