"""Provide text-encoder states of captions: encoded, kept in main memory where they fit, or read from a cache.

B captions, L text tokens, D width of the text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_model.text import encode_captions

MEMORY = 1 << 30  # bytes of remembered states: 1,092 captions of T5-XXL in bfloat16


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
    """The states of batches of captions, padded to one length.

    Captions are encoded once and remembered if there are so few that their states fit into `limit`. A memory of a part
    of them would help nobody: the order of the clips comes back to a caption only after all others.

    Args:
        tokenizer: tokenizer of the text encoder; None with `texts`.
        text_encoder: encodes captions; None with `texts`.
        texts: has the states of every caption, so that none is encoded; None to encode them.
        max_length: tokens L that the states are padded to.
        captions: number of captions that will be asked for.
        limit: bytes of main memory for remembered states, which are kept without padding.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        texts: CachedTexts | None,
        max_length: int,
        captions: int,
        limit: int = MEMORY,
    ) -> None:
        self.tokenizer, self.text_encoder, self.texts = tokenizer, text_encoder, texts
        self.max_length = max_length
        self.remembers = texts is None and captions * self._bytes_of_longest() <= limit
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str], states: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return states [B, L, D] and mask [B, L], in main memory unless they were encoded just now.

        Args:
            captions: b captions.
            states: their states [L, D] without padding, where the batch came with them.
        """
        if states:
            return self._pad(states)
        if self.texts is not None:
            return self._pad([self.texts(caption) for caption in captions])
        if not self.remembers:
            return encode_captions(self.tokenizer, self.text_encoder, captions, self.max_length)
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            y, mask = (part.cpu() for part in encode_captions(self.tokenizer, self.text_encoder, new, self.max_length))
            self._known |= {caption: y[i, : mask[i].sum()].clone() for i, caption in enumerate(new)}
        return self._pad([self._known[caption] for caption in captions])

    def _bytes_of_longest(self) -> int:
        """Return the bytes of the states of a caption that fills all tokens."""
        return int(self.max_length * self.text_encoder.config.d_model * self.text_encoder.dtype.itemsize)

    def _pad(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        dtype = self.text_encoder.dtype if self.texts is None else self.texts.dtype
        states = torch.zeros(len(texts), self.max_length, texts[0].shape[-1], dtype=dtype)
        mask = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for i, text in enumerate(texts):
            states[i, : len(text)] = text
            mask[i, : len(text)] = 1
        return states, mask
