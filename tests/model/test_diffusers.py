"""Equality with diffusers' own transformers of the same families."""

import pytest
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel

from stdit_model import STDiT
from stdit_model.errors import WeightsError

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "caption_channels": 24,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pixart(**overrides) -> PixArtTransformer2DModel:
    return randomised(PixArtTransformer2DModel(**{**SMALL, "sample_size": 16, **overrides}))


def frame_by_frame(model, x, t, y, mask):
    """PixArt on each frame of x [B, C, T, H, W]."""
    conditions = {"resolution": None, "aspect_ratio": None}
    frames = [model(f, y, t, conditions, encoder_attention_mask=mask.long()).sample for f in x.unbind(2)]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("frames", [1, 4, 16])
@pytest.mark.parametrize("variant", ["seq", "parallel"])
def test_pixart(variant, frames, inputs, relative, tmp_path) -> None:
    reference = pixart()
    reference.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no null caption"):
        model = STDiT.from_pixart(tmp_path, variant=variant)
    assert model.config.num_heads == 4  # from its config.json
    x, t, y, mask = inputs((2, 4, frames, 16, 16))
    with torch.no_grad():
        assert relative(model(x, t, y, mask), frame_by_frame(reference, x, t, y, mask)) < 2e-6


@pytest.mark.parametrize(
    ("sample_size", "interpolation_scale", "size"),
    [(16, None, 16), (16, None, 8), (16, 2, 16), (16, 2, 24), (64, None, 8), (256, None, 16)],
)
def test_pixart_positions(sample_size, interpolation_scale, size, inputs, relative, tmp_path) -> None:
    """PixArt stretches its positions to its native grid: space_scale = interpolation_scale * grid / native grid."""
    reference = pixart(
        sample_size=sample_size, interpolation_scale=interpolation_scale, use_additional_conditions=False
    )
    reference.save_pretrained(tmp_path)
    model = STDiT.from_pixart(tmp_path, null_caption=torch.randn(5, 24))
    native = interpolation_scale or max(sample_size // 64, 1)
    assert model.config.space_scale == native
    x, t, y, mask = inputs((2, 4, 2, size, size))
    with torch.no_grad():
        output = model(x, t, y, mask, space_scale=native * size / sample_size)
        assert relative(output, frame_by_frame(reference, x, t, y, mask)) < 2e-6


def test_pixart_in_every_wrapping(inputs, relative, tmp_path) -> None:
    """Sharded, a pipeline's folder, and one file alone are the same model."""
    reference, null_caption = pixart(), torch.randn(12, 24)
    reference.save_pretrained(tmp_path / "pipeline" / "transformer")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    file = (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "alone")
    x, t, y, mask = inputs((2, 4, 2, 16, 16))
    with torch.no_grad():
        expected = frame_by_frame(reference, x, t, y, mask)
        for path, options in ((tmp_path / "sharded", {}), (file, {"num_heads": 4})):
            model = STDiT.from_pixart(path, null_caption=null_caption, **options)
            assert relative(model(x, t, y, mask), expected) < 2e-6
            assert torch.equal(model.null_caption(1, 12)[0], null_caption)
        file.rename(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        model = STDiT.from_pixart(tmp_path / "pipeline", null_caption=null_caption)
        assert relative(model(x, t, y, mask), expected) < 2e-6


def test_micro_conditions_of_1024(tmp_path) -> None:
    pixart(sample_size=128, use_additional_conditions=True).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="micro-conditions on size and aspect ratio are not used"):
        model = STDiT.from_pixart(tmp_path, null_caption=torch.randn(12, 24))
    assert model.config.space_scale == 2.0


def test_what_does_not_show_in_the_tensors(tmp_path) -> None:
    pixart().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"num_heads=2 was requested, but the checkpoint has 4"):
        STDiT.from_pixart(tmp_path, num_heads=2)
    pixart(activation_fn="gelu").save_pretrained(tmp_path / "gelu")
    with pytest.raises(WeightsError, match="activation_fn is 'gelu'; expected 'gelu-approximate'"):
        STDiT.from_pixart(tmp_path / "gelu")


def latte_weights(reference: LatteTransformer3DModel, ours: STDiT) -> dict[str, torch.Tensor]:
    """Latte's tensors under our names; the cross-attention of temporal blocks, which Latte lacks, adds nothing."""
    theirs = reference.state_dict()
    sources = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
        "t_block.1": ["adaln_single.linear"],
        "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
        "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
        "final_layer.linear": ["proj_out"],
    }
    state = {"final_layer.scale_shift_table": theirs["scale_shift_table"]}
    for i, block in enumerate(ours.blocks):
        kind, attention = (
            ("transformer_blocks", "attn")
            if block.mixing == "spatial"
            else ("temporal_transformer_blocks", "attn_temp")
        )
        source = f"{kind}.{i // 2}"
        state[f"blocks.{i}.scale_shift_table"] = theirs[f"{source}.scale_shift_table"]
        parts = {
            f"{attention}.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
            f"{attention}.proj": ["attn1.to_out.0"],
            "mlp.fc1": ["ff.net.0.proj"],
            "mlp.fc2": ["ff.net.2"],
        }
        if block.mixing == "spatial":
            parts |= {
                "cross_attn.q_linear": ["attn2.to_q"],
                "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
                "cross_attn.proj": ["attn2.to_out.0"],
            }
        sources |= {f"blocks.{i}.{name}": [f"{source}.{part}" for part in of] for name, of in parts.items()}
    for name, of in sources.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = torch.cat([theirs.pop(f"{part}.{kind}") for part in of])
    assert not [name for name in theirs if "scale_shift_table" not in name]  # nothing of theirs is left out
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unsqueeze(2)
    silent = {
        name: torch.zeros_like(tensor)
        for name, tensor in ours.state_dict().items()
        if name not in state and (".cross_attn." in name or name == "y_embedder.y_embedding")
    }
    return state | silent


def test_latte_differs_as_the_docstring_says(tiny, inputs, relative, tmp_path) -> None:
    """With the temporal blocks' cross-attention silenced, our latte of depth 2N is diffusers' of N layers."""
    reference = randomised(LatteTransformer3DModel(**SMALL, sample_size=16, video_length=5))
    ours = tiny("latte", depth=4)
    ours.load_state_dict(latte_weights(reference, ours))
    x, t, y, _ = inputs((2, 4, 5, 16, 16))
    with torch.no_grad():
        expected = reference(x, t, y).sample
        assert relative(ours(x, t, y), expected) < 2e-6
        ours.blocks[1].cross_attn.proj.bias += 1
        assert relative(ours(x, t, y), expected) > 1e-3
    reference.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"LatteTransformer3DModel .not readable here"):
        STDiT.from_pixart(tmp_path)
