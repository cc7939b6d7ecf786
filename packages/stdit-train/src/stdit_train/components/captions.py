"""Provide text-encoder states of captions, encoded once and kept in memory, or read from a cache.

B captions, L text tokens, D width of the text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_model.text import encode_captions


class CachedTexts:
    """The states of single captions, without padding, from a cache.

    Args:
        dataset: a cache with a text part.
        dtype: type of the states.
        others: states [L, D] of captions that the cache lacks.
    """

    def __init__(self, dataset: LatentDataset, dtype: torch.dtype, others: dict[str, Tensor]) -> None:
        assert dataset.texts is not None
        assert dataset.text_metadata is not None
        self.cached, self.others, self.dtype = dataset.texts, others, dtype
        self.width = dataset.text_metadata["text_encoder"]["width"]

    def __call__(self, caption: str) -> Tensor:
        """Return the states [L, D] of a caption.

        Raises:
            DataError: neither the cache nor `others` has the caption.
        """
        states = self.others[caption] if caption in self.others else self.cached(caption)
        return states.to(self.dtype)


class TextMemory:
    """The states of batches of captions, padded to one length; each distinct caption is encoded once.

    Args:
        tokenizer: tokenizer of the text encoder; None with `texts`.
        text_encoder: encodes captions; None with `texts`.
        texts: has the states of every caption, so that none is encoded; None to encode them.
        max_length: tokens L that the states are padded to.
        limit: captions kept in memory; one more empties the memory.
    """

    def __init__(
        self, tokenizer: Any, text_encoder: Any, texts: CachedTexts | None, max_length: int, limit: int = 20_000
    ) -> None:
        self.tokenizer, self.text_encoder, self.texts = tokenizer, text_encoder, texts
        self.max_length = max_length
        self.limit = limit
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, captions: Sequence[str], states: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return states [B, L, D] and mask [B, L].

        Args:
            captions: b captions.
            states: their states [L, D] without padding, where the batch came with them.
        """
        if states:
            return self._pad(states)
        if self.texts is not None:
            return self._pad([self.texts(caption) for caption in captions])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) + len(new) > self.limit:
            self._known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            y, mask = encode_captions(self.tokenizer, self.text_encoder, new, self.max_length)
            self._known.update({caption: (y[i], mask[i]) for i, caption in enumerate(new)})
        known, masks = zip(*(self._known[caption] for caption in captions), strict=True)
        return torch.stack(known), torch.stack(masks)

    def _pad(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        dtype = self.text_encoder.dtype if self.texts is None else self.texts.dtype
        states = torch.zeros(len(texts), self.max_length, texts[0].shape[-1], dtype=dtype)
        mask = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for i, text in enumerate(texts):
            states[i, : len(text)] = text
            mask[i, : len(text)] = 1
        return states, mask
