"""Weights in: every layout, and nothing that doesn't fit."""

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stdit_model import PRESETS, STDiT
from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import WeightsError
from stdit_model.weights.layouts import position_scales
from stdit_model.weights.load import open_sora_weights, pixart_weights

LAYOUTS = ["top.pth", "ema.pth", "state_dict.pth", "model.pth", "model_state_dict.pth", "module.pth", "legacy.pth"]
LAYOUTS += ["plain.safetensors", "sharded", "sharded.bin"]


def write(folder, layout, tensors):
    """Weights as somebody might have saved them."""
    file = folder / layout
    if layout == "plain.safetensors":
        save_file(tensors, file)
    elif layout == "sharded":
        file.mkdir()
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, members in shards.items():
            save_file({name: tensors[name] for name in members}, file / shard)
        weight_map = {name: shard for shard, members in shards.items() for name in members}
        (file / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}'.replace("'", '"'))
    elif layout == "sharded.bin":
        file.mkdir()
        names = sorted(tensors)
        shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for shard, members in shards.items():
            torch.save({name: tensors[name] for name in members}, file / shard)
        weight_map = {name: shard for shard, members in shards.items() for name in members}
        (file / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif layout == "legacy.pth":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    elif layout == "top.pth":
        torch.save(tensors, file)
    else:
        torch.save({layout.removesuffix(".pth"): tensors, "epoch": 3}, file)
    return file


@pytest.fixture(scope="module")
def open_sora(golden):
    return golden("opensora_v1_stdit_64x512").weights


@pytest.fixture(scope="module")
def pixart(golden):
    return golden("pixart_alpha_512").weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_open_sora_layouts(layout, open_sora, tmp_path) -> None:
    model = STDiT.from_open_sora(write(tmp_path, layout, open_sora), num_heads=2)
    state = model.state_dict()
    assert state.keys() == open_sora.keys() - {"pos_embed", "pos_embed_temporal"}
    assert all(torch.equal(state[name], open_sora[name]) for name in state)
    assert not model.training


def test_recognised_by_content(open_sora, tmp_path) -> None:
    """A name says nothing: a torch archive called .safetensors, and the other way round."""
    torch.save(open_sora, tmp_path / "archive.safetensors")
    save_file(open_sora, tmp_path / "tensors.pth")
    for name in ("archive.safetensors", "tensors.pth"):
        assert STDiT.from_open_sora(tmp_path / name, num_heads=2).config.depth == 2


def test_sizes_are_read_from_the_tensors(tiny, tmp_path) -> None:
    config = {
        "depth": 3,
        "hidden_size": 24,
        "num_heads": 2,
        "patch_size": (2, 4, 2),
        "in_channels": 5,
        "learn_sigma": False,
        "mlp_ratio": 37 / 24,
        "caption_channels": 11,
        "model_max_length": 7,
    }
    model = tiny("seq", **config)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    read = STDiT.from_open_sora(tmp_path / "weights.safetensors", num_heads=2)
    assert {key: read.config[key] for key in config} == config


@pytest.mark.parametrize("variant", ["dit", "seq", "latte"])
def test_the_variant_shows(variant, tiny, tmp_path) -> None:
    save_file(tiny(variant).state_dict(), tmp_path / "weights.safetensors")
    assert STDiT.from_open_sora(tmp_path / "weights.safetensors", num_heads=4).config.variant == variant


def test_parallel_holds_what_seq_holds(tiny, tmp_path) -> None:
    save_file(tiny("parallel").state_dict(), tmp_path / "weights.safetensors")
    model = STDiT.from_open_sora(tmp_path / "weights.safetensors", num_heads=4, variant="parallel")
    assert model.config.variant == "parallel"


def test_heads(open_sora, tiny, tmp_path) -> None:
    save_file(tiny(hidden_size=144, num_heads=2).state_dict(), tmp_path / "wide.safetensors")
    assert STDiT.from_open_sora(tmp_path / "wide.safetensors").config.num_heads == 2  # 72 wide each
    with pytest.raises(WeightsError, match=r"width of 32 is not a multiple of 72: pass num_heads"):
        STDiT.from_open_sora(write(tmp_path, "top.pth", open_sora))


def test_scales_come_from_the_position_buffers(open_sora, tmp_path) -> None:
    file = write(tmp_path, "top.pth", open_sora)
    config = open_sora_weights(STDiT, file, num_heads=2).config
    assert (config["space_scale"], config["time_scale"]) == (1.0, 2 / 3)
    config = open_sora_weights(STDiT, file, num_heads=2, space_scale=0.5, time_scale=1.0).config
    assert (config["space_scale"], config["time_scale"]) == (0.5, 1.0)


def found_scales(shape, space, time, dtype=torch.float32):
    tables = {
        "pos_embed": spatial_positions(48, *shape[1:], space)[None].to(dtype),
        "pos_embed_temporal": temporal_positions(48, shape[0], time)[None].to(dtype),
    }
    return position_scales(tables)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 20), st.integers(1, 9), st.integers(2, 9)),
    space=st.floats(0.05, 20),
    time=st.floats(0.05, 20),
)
def test_any_scale_is_found(shape, space, time) -> None:
    scales, grid = found_scales(shape, space, time)
    assert scales == {"space_scale": pytest.approx(space, rel=1e-5), "time_scale": pytest.approx(time, rel=1e-5)}
    assert grid[0] == shape[0]
    assert grid[1:] == shape[1:] or shape[1] != shape[2]  # which of two rectangles doesn't always show


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_published_scales_are_found_exactly(dtype) -> None:
    for space, time in ((0.5, 1.0), (1.0, 2 / 3), (2.0, 1.0)):
        scales, grid = found_scales((16, 8, 8), space, time, dtype)
        assert (scales, grid) == ({"space_scale": space, "time_scale": time}, (16, 8, 8))


def test_other_position_buffers_give_no_scale(open_sora, tmp_path) -> None:
    """Learned positions, say: the scales are the defaults, unless given."""
    tensors = open_sora | {"pos_embed": torch.randn_like(open_sora["pos_embed"])}
    found = open_sora_weights(STDiT, write(tmp_path, "top.pth", tensors), num_heads=2)
    assert "space_scale" not in found.config
    assert found.grid is None


def test_dtype(open_sora, tmp_path) -> None:
    half = {name: tensor.half() for name, tensor in open_sora.items()}
    file = write(tmp_path, "top.pth", half)
    assert STDiT.from_open_sora(file, num_heads=2).dtype == torch.float32
    assert STDiT.from_open_sora(file, num_heads=2, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "override",
    [
        {"depth": 28},
        {"patch_size": (2, 2, 2)},
        {"variant": "dit"},
        {"caption_channels": 4096},
        {"model_max_length": 120},
        {"learn_sigma": False},
    ],
    ids=lambda override: next(iter(override)),
)
def test_overrides_may_not_contradict_the_file(override, open_sora, tmp_path) -> None:
    (key, value), file = next(iter(override.items())), write(tmp_path, "top.pth", open_sora)
    with pytest.raises(WeightsError, match=re.escape(f"top.pth: {key}={value} was requested, but the file has")):
        STDiT.from_open_sora(file, num_heads=2, **override)
    with pytest.raises(WeightsError, match="no argument flash"):
        STDiT.from_open_sora(file, num_heads=2, flash=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), source=st.sampled_from(["open_sora", "pixart"]))
def test_anything_missing_left_over_or_reshaped_is_an_error(data, source, open_sora, pixart, tmp_path_factory) -> None:
    """Any one tensor taken away, added, or of another shape."""
    original = {"open_sora": open_sora, "pixart": pixart}[source]
    read = {"open_sora": open_sora_weights, "pixart": pixart_weights}[source]
    name = data.draw(st.sampled_from(sorted(name for name in original if "pos_embed" not in name)))
    fault = data.draw(st.sampled_from(["missing", "left over", "reshaped"]))
    tensors = dict(original)
    if fault == "missing":
        del tensors[name]
    elif fault == "left over":
        tensors[f"{name}_"] = original[name]
    else:
        tensors[name] = original[name].unsqueeze(0)
    file = write(tmp_path_factory.mktemp("fault"), "top.pth", tensors)
    with pytest.raises(WeightsError) as caught:
        read(STDiT, file, num_heads=4)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_checkpoint(tmp_path) -> None:
    def refuses(error, match, content=None, name="file"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for read in (STDiT.from_open_sora, STDiT.from_pixart):
            with pytest.raises(error, match=match) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)

    refuses(FileNotFoundError, "nowhere: no such file", name="nowhere")
    refuses(WeightsError, "neither a safetensors file nor a torch archive", b"")
    refuses(WeightsError, "neither a safetensors file nor a torch archive", b"plain text, and more of it")
    refuses(WeightsError, "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuses(WeightsError, "not a readable safetensors file", (99).to_bytes(8, "little") + b'{"x"')
    refuses(WeightsError, "not a torch archive of tensors alone, it is damaged", b"\x80\x02garbage")
    refuses(WeightsError, "no index of a sharded checkpoint", b'{"a": 1}')
    torch.save({}, tmp_path / "empty")
    refuses(WeightsError, "holds no tensors", name="empty")
    save_file({}, tmp_path / "empty.safetensors")
    refuses(WeightsError, "holds no tensors", name="empty.safetensors")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "foreign")
    refuses(WeightsError, "none of the known layouts.*conv.weight", name="foreign")
    torch.save([torch.zeros(1)], tmp_path / "list")
    refuses(WeightsError, "expected a state dict, not list", name="list")
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "optimizer")
    refuses(WeightsError, "none of the entries ema, state_dict, model, .*; it holds optimizer", name="optimizer")
    (tmp_path / "folder").mkdir()
    refuses(WeightsError, "folder: is an empty folder", name="folder")


def test_pickled_code_never_runs(open_sora, tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"state_dict": open_sora, "trap": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match=r"asks for posix.mkdir; .*unpickling runs code"):
        STDiT.from_open_sora(tmp_path / "trap.pth", num_heads=2)
    assert not (tmp_path / "sprung").exists()


def test_tensors_beside_the_state_dict(open_sora, tmp_path) -> None:
    torch.save({"state_dict": open_sora, "blocks.0.extra": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"tensors beside the entry 'state_dict': blocks.0.extra"):
        STDiT.from_open_sora(tmp_path / "odd.pth", num_heads=2)


def test_shards_must_be_whole(open_sora, tmp_path) -> None:
    folder = write(tmp_path, "sharded", open_sora)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors: no such file"):
        STDiT.from_open_sora(folder, num_heads=2)
    save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(WeightsError, match="the index and its shards differ by"):
        STDiT.from_open_sora(folder, num_heads=2)


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}"])
def test_names_of_wrappers_are_removed(wrap, open_sora, tmp_path) -> None:
    file = write(tmp_path, "top.pth", {wrap.format(name): tensor for name, tensor in open_sora.items()})
    model = STDiT.from_open_sora(file, num_heads=2)
    assert torch.equal(model.t_block[1].weight, open_sora["t_block.1.weight"])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("t_block_temp.1.weight", r"STDiT2 \(Open-Sora 1.1\)"),
        ("spatial_blocks.0.attn.qkv.weight", "STDiT3"),
        ("y_embedder.embedding_table.weight", "DiT or Latte"),
        ("temp_embed", "Latte, original release"),
    ],
)
def test_other_models_are_named(key, said, open_sora, tmp_path) -> None:
    file = write(tmp_path, "top.pth", {**open_sora, key: torch.zeros(1)})
    with pytest.raises(WeightsError, match=f"the weights of {said}"):
        STDiT.from_open_sora(file, num_heads=2)


def test_weights_that_are_not_finite_are_refused(open_sora, tiny, tmp_path) -> None:
    spoiled = {**open_sora, "t_block.1.bias": open_sora["t_block.1.bias"].clone()}
    spoiled["t_block.1.bias"][3] = float("nan")
    with pytest.raises(WeightsError, match=r"t_block.1.bias has values that are not finite"):
        STDiT.from_open_sora(write(tmp_path, "top.pth", spoiled), num_heads=2)
    model = tiny()
    model.blocks[1].attn.qkv.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match=r"blocks.1.attn.qkv.weight has values that are not finite"):
        STDiT.from_pretrained(tmp_path / "model")


def test_the_other_layout(open_sora, pixart, tmp_path) -> None:
    with pytest.raises(WeightsError, match=r"PixArt-alpha, original release: read it with STDiT.from_pixart"):
        STDiT.from_open_sora(write(tmp_path, "top.pth", pixart), num_heads=4)
    with pytest.raises(WeightsError, match=r"Open-Sora v1.0.: read it with STDiT.from_open_sora"):
        STDiT.from_pixart(write(tmp_path, "ema.pth", open_sora), num_heads=4)


def test_pixart_ema(pixart, tmp_path) -> None:
    ema = {name: 2 * tensor for name, tensor in pixart.items()}
    torch.save({"state_dict": pixart, "state_dict_ema": ema, "optimizer": {}, "epoch": 1}, tmp_path / "p.pth")
    for asked, expected in ((False, pixart), (True, ema)):
        model = STDiT.from_pixart(tmp_path / "p.pth", num_heads=4, ema=asked)
        assert torch.equal(model.t_block[1].weight, expected["t_block.1.weight"])
    with pytest.raises(WeightsError, match="no entry 'state_dict_ema'; it holds state_dict, epoch"):
        STDiT.from_pixart(write(tmp_path, "state_dict.pth", pixart), num_heads=4, ema=True)


@pytest.mark.parametrize("variant", ["seq", "parallel", "dit", "latte"])
def test_what_each_variant_takes_of_pixart(variant, pixart, tmp_path) -> None:
    file = write(tmp_path, "state_dict.pth", pixart)
    found = pixart_weights(STDiT, file, num_heads=4, variant=variant)
    new = {"seq": {0, 1}, "parallel": {0, 1}, "dit": set(), "latte": {1}}[variant]
    unused = {1} if variant == "latte" else set()
    parts = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    assert set(found.new) == {f"blocks.{i}.attn_temp.{part}" for i in new for part in parts}
    assert set(found.unused) == {"pos_embed"} | {f"blocks.{i}.attn.{part}" for i in unused for part in parts}
    model = STDiT.from_pixart(file, num_heads=4, variant=variant)
    state = model.state_dict()
    for name in found.tensors:
        assert torch.equal(state[name].flatten(), pixart[name].flatten()), name
    for i in new:
        assert model.blocks[i].attn_temp.proj.weight.abs().max() == 0
        assert model.blocks[i].attn_temp.qkv.weight.abs().max() > 0


def test_micro_conditions_are_named(pixart, tmp_path) -> None:
    """PixArt's 1024-MS models add embeddings of the image's size, which video models don't have."""
    extra = {f"{kind}_embedder.mlp.0.weight": torch.zeros(10, 256) for kind in ("csize", "ar")}
    file = write(tmp_path, "state_dict.pth", pixart | extra)
    assert set(extra) < set(pixart_weights(STDiT, file, num_heads=4).unused)
    with pytest.warns(UserWarning, match="micro-conditions on size and aspect ratio are not used"):
        STDiT.from_pixart(file, num_heads=4)


def test_null_caption_replaces_the_files(pixart, tmp_path) -> None:
    file = write(tmp_path, "state_dict.pth", pixart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = STDiT.from_pixart(file, num_heads=4)
        assert torch.equal(model.y_embedder.y_embedding, pixart["y_embedder.y_embedding"])
        given_caption = STDiT.from_pixart(file, num_heads=4, null_caption=torch.ones(5, 24))
    assert torch.equal(given_caption.y_embedder.y_embedding, torch.ones(5, 24))
    assert given_caption.config.model_max_length == 5
    with pytest.raises(WeightsError, match=r"y_embedder.y_embedding is \[5, 7\], not \[5, 24\]"):
        STDiT.from_pixart(file, num_heads=4, null_caption=torch.ones(5, 7))


def own_memory() -> int:
    """Bytes of this process's own memory, files mapped into it aside."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "archive"])
def test_tensors_are_read_one_at_a_time(kind, tmp_path) -> None:
    """Going through the 155 MB of S/2 takes no more memory than a few of its tensors."""
    shapes = STDiT.parameter_shapes(**PRESETS["S/2"])
    file = tmp_path / kind
    save = save_file if kind == "safetensors" else torch.save
    save({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    assert file.stat().st_size > 150e6
    before, highest = own_memory(), 0
    for _, tensor in open_sora_weights(STDiT, file, num_heads=6).read():
        assert tensor.sum() == 0
        highest = max(highest, own_memory() - before)
    assert highest < 40e6


def test_the_file_may_go_away_afterwards(open_sora, tmp_path) -> None:
    """A model doesn't lean on the file it came from."""
    for layout in ("top.pth", "plain.safetensors"):
        file = write(tmp_path, layout, open_sora)
        model = STDiT.from_open_sora(file, num_heads=2)
        file.write_bytes(b"\0" * file.stat().st_size)
        with torch.no_grad():
            model.t_block[1].weight.add_(1)
        assert torch.equal(model.t_block[1].weight, open_sora["t_block.1.weight"] + 1)
        assert torch.equal(model.blocks[1].mlp.fc2.weight, open_sora["blocks.1.mlp.fc2.weight"])
