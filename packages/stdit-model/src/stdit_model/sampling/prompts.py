"""Encode prompts, or embeddings of them, to the text that each block of the model attends to.

Legend: B videos, L text tokens, Dc width of the text encoder.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stdit_model.errors import SettingsError
from stdit_model.model import STDiT, TextCache
from stdit_model.protocols import TextEncoder, Tokenizer
from stdit_model.text import encode_captions


class PromptEmbeds(NamedTuple):
    """Text-encoder states [B, L, Dc] and masks [B, L], a row per video; the negative None without guidance."""

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
) -> PromptEmbeds:
    """Encode prompts and what guidance moves away from; see `STDiTPipeline.encode_prompt`.

    Args:
        transformer: has the null caption.
        tokenizer, text_encoder: not needed for embeddings.
        prompt, negative_prompt: texts, unless their embeddings are passed.
        num_videos_per_prompt: rows for each prompt.
        guidance: whether the negative half is wanted.
        prompt_embeds, negative_prompt_embeds: states [B, L, Dc] and mask [B, L].

    Raises:
        SettingsError: a prompt is empty, or there is neither a prompt nor embeddings.
    """
    length = transformer.config.model_max_length
    y, mask = prompt_embeds
    if y is None or mask is None:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts or not all(p.strip() for p in prompts):
            raise SettingsError("the prompt is empty: say what the video should show")
        y, mask = _encode(tokenizer, text_encoder, prompts, length)
    y, mask = (x.repeat_interleave(num_videos_per_prompt, dim=0) for x in (y, mask))
    if not guidance:
        return PromptEmbeds(y, mask)

    negative_y, negative_mask = negative_prompt_embeds
    if negative_y is None or negative_mask is None:
        if negative_prompt is None:  # the null caption under the prompt's mask, as in training with caption dropout
            return PromptEmbeds(y, mask, transformer.null_caption(len(y), y.shape[1]).to(y), mask)
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        negative_y, negative_mask = _encode(tokenizer, text_encoder, negatives, length, "negative_prompt")
    repeat, rest = divmod(len(y), len(negative_y))
    if rest:
        raise SettingsError(f"{len(negative_y)} negative prompts for {len(y)} videos: pass one, or one for each prompt")
    return PromptEmbeds(y, mask, *(x.repeat_interleave(repeat, dim=0) for x in (negative_y, negative_mask)))


def cache_text(transformer: STDiT, embeds: PromptEmbeds, device: torch.device) -> TextCache:
    """Compute the text's keys and values for every block, once for all steps; the negative half comes second."""
    y, mask, negative_y, negative_mask = embeds
    if negative_y is not None and negative_mask is not None:
        y, mask = torch.cat([y, negative_y.to(y)]), torch.cat([mask, negative_mask.to(mask)])
    hook = getattr(transformer, "_hf_hook", None)
    if hook is not None:  # CPU offload, which otherwise brings the weights before `forward` only
        hook.pre_forward(transformer)
    return transformer.encode_text(y.to(device, transformer.dtype), mask.to(device))


def _encode(
    tokenizer: Tokenizer | None,
    text_encoder: TextEncoder | None,
    prompts: Sequence[str],
    length: int,
    kind: str = "prompt",
) -> tuple[Tensor, Tensor]:
    if text_encoder is None or tokenizer is None:
        raise SettingsError(f"this pipeline has no text encoder: pass {kind}_embeds and {kind}_attention_mask")
    return encode_captions(tokenizer, text_encoder, prompts, length)
