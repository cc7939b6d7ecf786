"""States of captions: encoded once where they fit into memory, each time where they do not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit_train.components.captions import TextMemory
from stdit_train.components.load import load_components

LENGTH = 6
CAPTIONS = ["red circle", "a blue square moving left", "red circle"]


class Counting:
    """A text encoder that counts the captions that it encodes."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.encoded = encoder, 0
        self.config, self.dtype, self.device = encoder.config, encoder.dtype, encoder.device

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.encoded += len(input_ids)
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[no-any-return]


@pytest.fixture
def parts() -> tuple[Any, Counting]:
    components = load_components("demo", "demo", torch.device("cpu"), "fp32")
    return components.tokenizer, Counting(components.text_encoder)


def test_few_captions_are_encoded_once(parts: tuple[Any, Counting]) -> None:
    memory = TextMemory(*parts, None, LENGTH, captions=3)
    states, mask = memory(CAPTIONS)
    assert memory.remembers and parts[1].encoded == 2
    again, same_mask = memory(CAPTIONS)
    assert parts[1].encoded == 2
    assert torch.equal(states, again) and torch.equal(mask, same_mask)


def test_of_many_captions_none_is_remembered(parts: tuple[Any, Counting]) -> None:
    states = LENGTH * parts[1].config.d_model * 4
    memory = TextMemory(*parts, None, LENGTH, captions=3, limit=3 * states - 1)
    assert not memory.remembers and TextMemory(*parts, None, LENGTH, captions=3, limit=3 * states).remembers
    memory(CAPTIONS)
    memory(CAPTIONS)
    assert parts[1].encoded == 6 and not memory._known


def test_what_is_remembered_is_what_was_encoded(parts: tuple[Any, Counting]) -> None:
    """Where there is text; padding, which the mask hides, is zero."""
    states, mask = TextMemory(*parts, None, LENGTH, captions=3)(CAPTIONS)
    encoded, encoded_mask = TextMemory(*parts, None, LENGTH, captions=3, limit=0)(CAPTIONS)
    assert torch.equal(mask, encoded_mask)
    torch.testing.assert_close(states, encoded * mask[..., None])
