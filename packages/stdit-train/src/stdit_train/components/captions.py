""""""

import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_model.text import encode_captions
from stdit_train.components.load import Components


class TextMemory:
    """Captions to text-encoder states; each distinct caption is encoded once and kept, in memory, up to a limit."""

    def __init__(self, components: Components, max_length: int, limit: int = 20_000) -> None:
        self.components = components
        self.max_length = max_length
        self.limit = limit
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._given: dict[str, Tensor] = {}

    def give(self, captions: list[str], states: list[Tensor] | None) -> None:
        """Take the states of a batch, [L, Dc] without padding, from a cache; they are kept until the next batch."""
        self._given = dict(zip(captions, states, strict=True)) if states else {}

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, Dc] and mask [B, L]."""
        if self._given and all(caption in self._given for caption in captions):
            return self._pad([self._given[caption] for caption in captions])
        if self.components.texts is not None:
            return self._pad([self.components.texts(caption) for caption in captions])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) + len(new) > self.limit:
            self._known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            parts = self.components
            y, mask = encode_captions(parts.tokenizer, parts.text_encoder, new, self.max_length)
            self._known.update({caption: (y[i], mask[i]) for i, caption in enumerate(new)})
        states, masks = zip(*(self._known[caption] for caption in captions), strict=True)
        return torch.stack(states), torch.stack(masks)

    def _pad(self, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        known = self.components.texts
        dtype = self.components.text_encoder.dtype if known is None else known.dtype
        states = torch.zeros(len(texts), self.max_length, texts[0].shape[-1], dtype=dtype)
        mask = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for i, text in enumerate(texts):
            states[i, : len(text)] = text
            mask[i, : len(text)] = 1
        return states, mask


class KnownTexts:
    """Captions to states [L, D] without padding.

    Args:
        dataset: a cache with a text part.
        dtype: of the states.
        others: captions that are not in it.
    """

    def __init__(self, dataset: LatentDataset, dtype: torch.dtype, others: dict[str, Tensor]) -> None:
        assert dataset.texts is not None
        assert dataset.about_text is not None
        self.cached, self.others, self.dtype = dataset.texts, others, dtype
        self.width = dataset.about_text["text_encoder"]["width"]

    def __call__(self, caption: str) -> Tensor:
        """States of one caption.

        Raises:
            DataError: it is not known.
        """
        states = self.others[caption] if caption in self.others else self.cached(caption)
        return states.to(self.dtype)
