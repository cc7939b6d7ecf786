"""Hashes that tell models apart, and know one again in another precision."""

import copy

import torch
from transformers import T5EncoderModel

from stdit_model import CausalVideoVAE
from stdit_train.components.identity import about_vae, text_encoder_hash, vae_hash
from stdit_train.demo.autoencoder import AutoencoderConfig, build_autoencoder
from stdit_train.demo.text import build_text_encoder


def large_text_encoder(seed: int) -> T5EncoderModel:
    """With an embedding of which only every so many values are looked at."""
    return build_text_encoder(4000, width=32, seed=seed)


def test_a_model_is_known_in_any_precision() -> None:
    vae, text = build_autoencoder(AutoencoderConfig()), large_text_encoder(0)
    assert vae_hash(vae) == vae_hash(copy.deepcopy(vae).to(torch.bfloat16)) == vae_hash(vae)
    assert text_encoder_hash(text) == text_encoder_hash(copy.deepcopy(text).to(torch.bfloat16))


def test_other_weights_have_another_hash() -> None:
    vae = build_autoencoder(AutoencoderConfig())
    before = vae_hash(vae)
    assert before != vae_hash(build_autoencoder(AutoencoderConfig(seed=1)))
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.1)
    assert before != vae_hash(vae)
    assert text_encoder_hash(large_text_encoder(0)) != text_encoder_hash(large_text_encoder(1))


def test_the_same_weights_with_other_codes_are_another_vae() -> None:
    shape = {"latent_channels": 2, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    vae, other = (CausalVideoVAE(**shape, levels=levels) for levels in ((8, 5), (7, 5)))
    other.load_state_dict(vae.state_dict())
    assert about_vae(vae, "a")["hash"] == about_vae(other, "a")["hash"]
    assert about_vae(vae, "a") != about_vae(other, "a")
    assert about_vae(vae, "a")["scale"]["levels"] == [8, 5]  # as read back from JSON
