"""Conversion between layouts, and what `describe` says of a file."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from stdit_model import VARIANTS, STDiT
from stdit_model.convert import describe, read_null_caption, write_open_sora
from stdit_model.errors import WeightsError
from stdit_model.sampling.folder import write_pipeline

GOLDEN = ["opensora_v1_stdit_16x256", "opensora_v1_stdit_64x512", "opensora_v1_stdit_edges"]


@pytest.fixture
def open_sora(golden, tmp_path):
    """An Open-Sora .pth, and its number of heads."""

    def write(name=GOLDEN[0], dtype=torch.float32):
        file = golden(name)
        torch.save({key: value.to(dtype) for key, value in file.weights.items()}, tmp_path / "release.pth")
        return tmp_path / "release.pth", file.config["num_heads"]

    return write


@pytest.fixture
def pixart(golden, tmp_path):
    torch.save({"state_dict": golden("pixart_alpha_512").weights}, tmp_path / "pixart.pth")
    return tmp_path / "pixart.pth"


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GOLDEN)
def test_open_sora_to_a_pipeline_and_back(name, dtype, open_sora, tmp_path) -> None:
    """Bit for bit, the position buffers too."""
    source, heads = open_sora(name, dtype)
    write_pipeline(source, tmp_path / "pipeline", num_heads=heads)
    write_open_sora(tmp_path / "pipeline", tmp_path / "back.pth")
    write_open_sora(tmp_path / "pipeline", tmp_path / "back.safetensors")
    original = torch.load(source, weights_only=True)
    assert same(original, torch.load(tmp_path / "back.pth", weights_only=True))
    assert same(original, load_file(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_settings_without_a_place_in_the_layout_are_kept(suffix, tiny, tmp_path) -> None:
    model = tiny(space_scale=0.5, time_scale=2 / 3)
    model.save_pretrained(tmp_path / "model")
    write_open_sora(tmp_path / "model", tmp_path / f"file{suffix}")
    back = STDiT.from_open_sora(tmp_path / f"file{suffix}")
    for key in ("num_heads", "space_scale", "time_scale"):
        assert back.config[key] == model.config[key], key
    assert f"heads         {model.config.num_heads}" in "\n".join(describe(tmp_path / f"file{suffix}"))
    with pytest.raises(WeightsError, match="num_heads=1 was requested, but the checkpoint has"):
        STDiT.from_open_sora(tmp_path / f"file{suffix}", num_heads=1)
    module = torch.nn.Module()
    plain = torch.load(tmp_path / "file.pth", weights_only=True) if suffix == ".pth" else {}
    assert not module.load_state_dict(plain, strict=False).missing_keys  # torch does not mind the metadata


def test_open_sora_to_open_sora(open_sora, tmp_path) -> None:
    source, heads = open_sora()
    write_open_sora(source, tmp_path / "copy.safetensors", num_heads=heads)
    assert same(torch.load(source, weights_only=True), load_file(tmp_path / "copy.safetensors"))


def test_position_buffers_where_a_size_is_known(tiny, tmp_path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    write_open_sora(tmp_path / "model", tmp_path / "without.pth")
    assert "pos_embed" not in torch.load(tmp_path / "without.pth", weights_only=True)
    write_open_sora(tmp_path / "model", tmp_path / "with.pth", grid=(3, 4, 5))
    tensors = torch.load(tmp_path / "with.pth", weights_only=True)
    assert tensors["pos_embed"].shape == (1, 20, 48)
    assert tensors["pos_embed_temporal"].shape == (1, 3, 48)


@pytest.mark.parametrize("variant", ["dit", "parallel", "latte"])
def test_open_sora_has_one_variant(variant, tiny, tmp_path) -> None:
    tiny(variant).save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match=f"only the variant seq, this is {variant}"):
        write_open_sora(tmp_path / "model", tmp_path / "file.pth")
    assert not (tmp_path / "file.pth").exists()


class Pipeline(DiffusionPipeline):
    """Stands in for STDiTPipeline, which needs transformers."""

    def __init__(self, transformer, vae, text_encoder, tokenizer, scheduler, num_frames=16, height=256, width=256):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(num_frames=num_frames, height=height, width=width)


def test_a_pipeline_folder_as_diffusers_reads_it(open_sora, tmp_path, caplog) -> None:
    source, heads = open_sora("opensora_v1_stdit_64x512")
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], norm_num_groups=4)
    vae.save_pretrained(tmp_path / "my_vae")
    written = write_pipeline(
        source, tmp_path / "pipeline", num_heads=heads, vae=tmp_path / "my_vae", text_encoder="me/t5/encoder"
    )
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "STDiTPipeline"
    assert index["_hub_components"] == {"text_encoder": "me/t5/encoder", "tokenizer": "DeepFloyd/t5-v1_1-xxl"}
    assert index["transformer"] == ["stdit_model", "STDiT"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    pipeline = Pipeline.from_pretrained(tmp_path / "pipeline", text_encoder=None, tokenizer=None)
    assert isinstance(pipeline.transformer, STDiT)
    assert same(pipeline.transformer.state_dict(), written.state_dict())
    assert same(pipeline.vae.state_dict(), vae.state_dict())
    assert (pipeline.config.num_frames, pipeline.config.height, pipeline.config.width) == (6, 64, 64)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    config = pipeline.scheduler.config
    assert (config.variance_type, config.timestep_spacing, config.clip_sample) == ("learned_range", "linspace", False)
    assert not [record for record in caplog.records if "_hub_components" in record.getMessage()]


def test_schedulers(tiny, open_sora, tmp_path) -> None:
    def classes(source, name, **options):
        write_pipeline(source, tmp_path / name, **options)
        return json.loads((tmp_path / name / "model_index.json").read_text())["scheduler"]

    source, heads = open_sora()
    tiny(learn_sigma=False).save_pretrained(tmp_path / "flow_model")
    assert classes(tmp_path / "flow_model", "a") == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert classes(source, "b", num_heads=heads, scheduler="flow") == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert classes(source, "c", num_heads=heads, scheduler=tmp_path / "b" / "scheduler")[1].startswith("FlowMatch")
    assert classes(source, "d", num_heads=heads, scheduler="me/scheduler") == [None, None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixart_to_a_pipeline(variant, pixart, tmp_path) -> None:
    write_pipeline(pixart, tmp_path / "pipeline", num_heads=4, variant=variant, space_scale=0.5)
    model = STDiT.from_pretrained(tmp_path / "pipeline" / "transformer")
    assert (model.config.variant, model.config.space_scale) == (variant, 0.5)
    assert "num_frames" not in json.loads((tmp_path / "pipeline" / "model_index.json").read_text())


def test_null_caption_from_a_file(golden, tmp_path) -> None:
    weights = golden("pixart_alpha_512").weights
    save_file({"null": torch.ones(3, 24)}, tmp_path / "null.safetensors")
    torch.save(weights, tmp_path / "p.pth")
    null_caption = read_null_caption(tmp_path / "null.safetensors")
    model = write_pipeline(tmp_path / "p.pth", tmp_path / "out", num_heads=4, null_caption=null_caption)
    assert torch.equal(model.null_caption(1, 3)[0], torch.ones(3, 24))
    with pytest.raises(WeightsError, match="one tensor"):
        read_null_caption(tmp_path / "p.pth")


def test_refusals(tiny, open_sora, tmp_path) -> None:
    source, heads = open_sora()
    tiny().save_pretrained(tmp_path / "model")

    def refuses(error, match, call):
        with pytest.raises(error, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    refuses(FileExistsError, "model: already exists", lambda: write_pipeline(source, tmp_path / "model"))
    refuses(FileExistsError, "release.pth: already exists", lambda: write_open_sora(tmp_path / "model", source))
    out = tmp_path / "out"
    refuses(FileNotFoundError, "nowhere: no such file", lambda: write_pipeline(tmp_path / "nowhere", out))
    for vae in ("vae", "./vae", "/a/vae"):
        refuses(
            FileNotFoundError, "neither a folder nor a Hub id",
            lambda vae=vae: write_pipeline(source, out, num_heads=heads, vae=vae),
        )  # fmt: skip
    refuses(
        FileNotFoundError, "no config.json in this folder, so it is not a vae",
        lambda: write_pipeline(source, out, num_heads=heads, vae=tmp_path),
    )  # fmt: skip
    refuses(WeightsError, "has its own num_heads", lambda: write_pipeline(tmp_path / "model", out, num_heads=2))
    refuses(
        WeightsError, "null_caption are for PixArt",
        lambda: write_pipeline(source, out, num_heads=heads, null_caption=torch.ones(1, 1)),
    )  # fmt: skip
    assert not out.exists()  # nothing is left behind


def lines(path, **options) -> dict[str, str]:
    """`describe` as a table."""
    return {line[:14].strip(): line[14:] for line in describe(path, **options)[1:]}


def test_describe_open_sora(open_sora) -> None:
    told = lines(open_sora("opensora_v1_stdit_64x512")[0])
    assert told["layout"].startswith("STDiT")
    assert told["parameters"].startswith("61,568 in 53 tensors")
    assert told["dtype"] == "float32 (54)"
    assert told["sizes"].startswith("depth 2, width 32, patch 1x2x2, 4 latent channels, MLP ratio 4, captions 24 wide")
    assert told["positions"] == "space_scale 1, time_scale 0.666667"
    assert told["not used"] == "pos_embed, pos_embed_temporal"
    assert told["as seq"] == told["as parallel"] == "every tensor fits"
    assert told["as dit"].startswith("does not fit: 8 unexpected keys (blocks.0.attn_temp.proj.bias")


def test_describe_pixart(golden, tmp_path) -> None:
    weights = golden("pixart_alpha_512").weights
    torch.save({"state_dict": weights, "state_dict_ema": weights, "epoch": 1}, tmp_path / "p.pth")
    told = lines(tmp_path / "p.pth")
    assert "under 'state_dict' (beside it: state_dict_ema, epoch)" in told["layout"]
    assert "under 'state_dict_ema'" in lines(tmp_path / "p.pth", ema=True)["layout"]
    assert told["as seq"].startswith("every tensor fits; 8 are new (blocks.0.attn_temp")
    assert told["as dit"] == "every tensor fits"
    assert "4 are not used (blocks.1.attn." in told["as latte"]
    weights = {name: tensor for name, tensor in weights.items() if name != "t_block.1.bias"}
    torch.save(weights, tmp_path / "broken.pth")
    assert lines(tmp_path / "broken.pth")["as seq"] == "does not fit: 1 missing keys (t_block.1.bias)"


def test_describe_what_is_not_known(tmp_path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="none of the known layouts"):
        describe(tmp_path / "a.safetensors")


def test_describe_a_saved_model(tiny, tmp_path) -> None:
    tiny("latte").save_pretrained(tmp_path)
    told = lines(tmp_path)
    assert told["heads"] == "4"
    assert told["as latte"] == "every tensor fits"
    assert told["as dit"].startswith("does not fit")


def test_a_pipeline_keeps_what_it_records(tiny, tmp_path) -> None:
    """To another folder: components, scheduler and the defaults of calls."""
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    tiny(learn_sigma=False).save_pretrained(tmp_path / "model")
    first = tmp_path / "first"
    write_pipeline(tmp_path / "model", first, vae=tmp_path / "vae", text_encoder="me/t5")
    config = first / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 1.0', '"shift": 4.0'))
    index = json.loads((first / "model_index.json").read_text())
    index |= {"fps": 12, "guidance_scale": 1.7, "num_inference_steps": 8, "num_frames": 16, "resampling_steps": 0}
    (first / "model_index.json").write_text(json.dumps(index))
    write_pipeline(first, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "model_index.json").read_text()) == index
    assert (tmp_path / "second" / "scheduler" / "scheduler_config.json").read_text() == config.read_text()
    assert same(AutoencoderKL.from_pretrained(tmp_path / "second" / "vae").state_dict(), vae.state_dict())
    write_pipeline(first, tmp_path / "third", scheduler="flow", tokenizer="me/words")
    third = json.loads((tmp_path / "third" / "model_index.json").read_text())
    assert third["_hub_components"] == {"text_encoder": "me/t5", "tokenizer": "me/words"}
    assert '"shift": 1.0' in (tmp_path / "third" / "scheduler" / "scheduler_config.json").read_text()


def test_a_text_encoder_is_copied_once(tiny, tmp_path) -> None:
    """Its folder holds the tokenizer, too."""
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "t5").mkdir()
    for name in ("config.json", "tokenizer_config.json", "spiece.model", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / "t5" / name).write_text('{"tokenizer_class": "T5Tokenizer"}')
    write_pipeline(tmp_path / "model", tmp_path / "out", text_encoder=tmp_path / "t5")
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").is_file()
    names = {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()}
    assert names == {"config.json", "tokenizer_config.json", "spiece.model"}
