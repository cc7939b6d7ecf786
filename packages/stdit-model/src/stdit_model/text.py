"""Captions to what the transformer is conditioned on: cleaning, T5 encoding.

L text tokens, Dc width of the text encoder.
"""

import html
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_URL = re.compile(r"(?:https?://|www\.)\S+")
_TAG = re.compile(r"<[^<>]*>")
_HANDLE = re.compile(r"@[\w\d]+\b")
_CJK = re.compile("[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+")
_FILE_NAME = re.compile(r"\S+\.(?:png|jpe?g|bmp|webp|gif|mp4|mov|avi|eps|pdf|apk|docx?|svg)\b")
_LONG_NUMBER = re.compile(r"#?\b\d{7,}\b")
_DASHES = re.compile("[\u002d\u058a\u2010-\u2015\u2e3a\u2e3b\u301c\u3030\ufe31\ufe32\ufe58\ufe63\uff0d]+")
_QUOTES = str.maketrans({"`": "'", "´": "'", "‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"'})
_ODD = re.compile(r"[#@*|\\~^_={}\[\]()<>•©®™]+")
_REPEATED = re.compile(r"([,.!?;:'\"-])\1+")
_SPACE = re.compile(r"\s+")


def clean_caption(caption: str) -> str:
    """Lower-cased, without URLs, HTML, CJK characters, file names, odd punctuation and long digit runs.

    What PixArt-alpha and Open-Sora 1.0 do before T5 in kind, not to the letter. Cleaning twice, as they do, undoes
    what is escaped twice; this does so by itself, so that `clean_caption(clean_caption(c)) == clean_caption(c)`.
    """
    before = None
    while caption != before:
        before = caption
        caption = html.unescape(caption).lower()
        for pattern in (_URL, _TAG, _HANDLE, _CJK, _FILE_NAME, _LONG_NUMBER):
            caption = pattern.sub(" ", caption)
        caption = _DASHES.sub("-", caption.translate(_QUOTES))
        caption = _REPEATED.sub(r"\1", _ODD.sub(" ", caption))
        caption = _SPACE.sub(" ", caption).strip(" -:;,'\"")
    return caption


def encode_captions(
    tokenizer: Any,
    text_encoder: Any,
    captions: Sequence[str],
    max_length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Text-encoder states [B, L, Dc] and mask [B, L] (1 where there is text), padded to `max_length` tokens.

    What is longer is cut off: see `dropped_text`. `device` is where tokens go: the encoder's own unless given, which an
    encoder whose layers are offloaded doesn't know.
    """
    tokens = tokenizer(
        [clean_caption(caption) for caption in captions],
        max_length=max_length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(device or text_encoder.device)
    with torch.no_grad():
        states = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask


def unknown_words(tokenizer: Any, caption: str) -> list[str]:
    """The words of a caption that the tokenizer has no token for, in order. Sentence-piece tokenizers know all."""
    words = clean_caption(caption).split()
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]
    return list(dict.fromkeys(unknown))


def dropped_text(tokenizer: Any, caption: str, max_length: int) -> str:
    """What `encode_captions` cuts off the end of a caption, "" when it fits."""
    ids = tokenizer(clean_caption(caption)).input_ids
    return tokenizer.decode(ids[max_length - 1 :], skip_special_tokens=True) if len(ids) > max_length else ""
