"""Clean captions and encode them with T5.

Legend: B captions, L text tokens, Dc width of the text encoder.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # captions are cleaned without torch
    import torch
    from torch import Tensor

    from stdit_model.protocols import TextEncoder, Tokenizer

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
    """Clean a caption: lower case, no URLs, HTML, CJK characters, file names, odd punctuation or long digit runs.

    Similar to the cleaning of PixArt-alpha and Open-Sora 1.0, but not identical. They clean twice, to undo double
    escaping; this repeats until nothing changes, so cleaning a cleaned caption has no effect.
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
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    captions: Sequence[str],
    max_length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode captions to states [B, L, Dc] and mask [B, L] (1 for text, 0 for padding).

    Args:
        tokenizer, text_encoder: T5's.
        captions: are cleaned first.
        max_length: L; longer captions are truncated, see `dropped_text`.
        device: of the tokens, by default the encoder's; needed for an encoder whose layers are offloaded.
    """
    tokens = tokenizer(
        [clean_caption(caption) for caption in captions],
        max_length=max_length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(device or text_encoder.device)
    import torch

    with torch.no_grad():
        states = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask


def unknown_words(tokenizer: Tokenizer, caption: str) -> list[str]:
    """Return the words of a caption that are unknown to the tokenizer; sentence-piece tokenizers know all words."""
    words = clean_caption(caption).split()
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]
    return list(dict.fromkeys(unknown))


def dropped_text(tokenizer: Tokenizer, caption: str, max_length: int) -> str:
    """Return the end of a caption that `encode_captions` truncates, "" if it fits."""
    ids = tokenizer(clean_caption(caption)).input_ids
    return tokenizer.decode(ids[max_length - 1 :], skip_special_tokens=True) if len(ids) > max_length else ""
