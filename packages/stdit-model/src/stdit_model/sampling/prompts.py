"""Encode prompts, or embeddings of them, to the text that each block of the model attends to.

Legend: B videos, L text tokens, Dc width of the text encoder.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stdit_model.errors import SettingsError
from stdit_model.layers import TextCache
from stdit_model.model import STDiT
from stdit_model.protocols import TextEncoder, Tokenizer
from stdit_model.sampling.inputs import check_number, check_prompts
from stdit_model.text import encode_captions


class PromptEmbeds(NamedTuple):
    """Text-encoder states [B, L, Dc] and masks [B, L], a row per video.

    The negative mask is None without guidance, the negative states without guidance or for the null caption.
    """

    prompt_embeds: Tensor
    prompt_attention_mask: Tensor
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None


def encode_prompts(
    transformer: STDiT,
    tokenizer: Tokenizer | None,
    text_encoder: TextEncoder | None,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    num_videos_per_prompt: int,
    guidance: bool,
    prompt_embeds: tuple[Tensor | None, Tensor | None],
    negative_prompt_embeds: tuple[Tensor | None, Tensor | None],
    device: torch.device | None = None,
) -> PromptEmbeds:
    """Encode prompts and what guidance moves away from; see `STDiTPipeline.encode_prompt`.

    Args:
        transformer: has the length of captions.
        tokenizer, text_encoder: not needed for embeddings.
        prompt, negative_prompt: texts, unless their embeddings are passed.
        num_videos_per_prompt: rows for each prompt.
        guidance: whether the negative half is wanted.
        prompt_embeds, negative_prompt_embeds: states [B, L, Dc] and mask [B, L].
        device: to encode on, by default the text encoder's.

    Raises:
        SettingsError: a prompt is empty or has no words, there are neither prompts nor embeddings, or another number
            of negative prompts.
    """
    length = transformer.config.model_max_length
    y, mask = prompt_embeds
    if y is None or mask is None:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        check_prompts(prompts)
        y, mask = _encode(tokenizer, text_encoder, prompts, length, device)
    number = len(y)
    y, mask = (x.repeat_interleave(num_videos_per_prompt, dim=0) for x in (y, mask))
    if not guidance:
        return PromptEmbeds(y, mask)

    negative_y, negative_mask = negative_prompt_embeds
    if negative_y is None or negative_mask is None:
        if negative_prompt is None:  # the null caption under the prompt's mask, as in training with caption dropout
            return PromptEmbeds(y, mask, None, mask)
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        check_prompts(negatives, "negative prompt")
        check_number(len(negatives), number)
        negative_y, negative_mask = _encode(tokenizer, text_encoder, negatives, length, device, "negative_prompt")
    repeat = len(y) // len(negative_y)
    return PromptEmbeds(y, mask, *(x.repeat_interleave(repeat, dim=0) for x in (negative_y, negative_mask)))


def cache_text(transformer: STDiT, embeds: PromptEmbeds, device: torch.device) -> TextCache:
    """Return the text whose keys and values are computed once for all steps; the negative half comes first."""
    y, mask, negative_y, negative_mask = embeds
    null = None
    if negative_mask is not None:
        if negative_y is None:  # the null caption, which the model puts in the place of these rows
            negative_y, null = y, torch.arange(2 * len(y), device=device) < len(y)
        y, mask = torch.cat([negative_y.to(y), y]), torch.cat([negative_mask.to(mask), mask])
    return transformer.encode_text(y.to(device, transformer.dtype), mask.to(device), null)


def _encode(
    tokenizer: Tokenizer | None,
    text_encoder: TextEncoder | None,
    prompts: Sequence[str],
    length: int,
    device: torch.device | None,
    kind: str = "prompt",
) -> tuple[Tensor, Tensor]:
    if text_encoder is None or tokenizer is None:
        raise SettingsError(f"this pipeline has no text encoder: pass {kind}_embeds and {kind}_attention_mask")
    return encode_captions(tokenizer, text_encoder, prompts, length, device)
