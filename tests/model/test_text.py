"""Captions: cleaning, and what a tokenizer does not know."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="text is part of the extra `pipeline`")

from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stdit_model.text import clean_caption, dropped_text, encode_captions, unknown_words


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Red  Circle.", "a red circle."),
        ("see https://example.com/a?b=c now", "see now"),
        ("<p>Hello &amp;amp; goodbye</p>", "hello & goodbye"),
        ("a cat 红色 moving", "a cat moving"),
        ("IMG_0001.jpg a dog", "a dog"),
        ("video no. 123456789 of a dog", "video no. of a dog"),
        ("wow!!!! (really)", "wow! really"),
        ("“quoted” — dash", '"quoted" - dash'[1:]),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@given(st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once(caption: str) -> None:
    once = clean_caption(caption)
    assert clean_caption(once) == once


def test_encoding_pads_and_masks() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    encoder, tokenizer = T5EncoderModel(config).eval(), ByT5Tokenizer()
    states, mask = encode_captions(tokenizer, encoder, ["ab", "abcdef"], 10)
    assert states.shape == (2, 10, 32)
    assert mask.sum(1).tolist() == [3, 7]  # a byte each, and </s>
    alone, _ = encode_captions(tokenizer, encoder, ["ab"], 5)
    torch.testing.assert_close(states[0, :3], alone[0, :3], rtol=1e-5, atol=1e-6)


def test_byte_tokenizers_know_every_word_and_cut_what_is_long() -> None:
    tokenizer = ByT5Tokenizer()
    assert unknown_words(tokenizer, "zyzzyva") == []
    assert dropped_text(tokenizer, "abc", 10) == ""
    assert dropped_text(tokenizer, "abcdefghij", 6) == "fghij"
