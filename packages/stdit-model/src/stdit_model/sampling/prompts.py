"""The prompt side of the pipeline: words, or embeddings of them, to the text that each block of the model reads.

Legend: B videos, L text tokens, Dc width of the text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stdit_model.model import STDiT, TextCache
from stdit_model.text import encode_captions


class Prompting:
    """Of `STDiTPipeline`, whose parts it uses."""

    transformer: STDiT
    text_encoder: Any
    tokenizer: Any
    _execution_device: torch.device

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Prompts to states [B, L, Dc] and mask [B, L] of the text encoder, and the same of what guidance moves from.

        What is given as embeddings stays as it is. The null caption, which stands in where there is no negative
        prompt, has the mask of its prompt, as in training with caption dropout.

        Returns:
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask (both None
            without guidance), each video's on its own line.

        Raises:
            ValueError: an empty prompt, or neither prompt nor embeddings.
        """
        length = self.transformer.config.model_max_length
        if prompt_embeds is None or prompt_attention_mask is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            if not prompts or not all(p.strip() for p in prompts):
                raise ValueError("the prompt is empty: say what the video should show")
            prompt_embeds, prompt_attention_mask = self._encode(prompts, length)
        y = prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        mask = prompt_attention_mask.repeat_interleave(num_videos_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return y, mask, None, None
        if negative_prompt_embeds is not None and negative_prompt_attention_mask is not None:
            negative_y, negative_mask = negative_prompt_embeds, negative_prompt_attention_mask
        elif negative_prompt is None:
            return y, mask, self.transformer.null_caption(len(y), y.shape[1]).to(y), mask
        else:
            negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
            negative_y, negative_mask = self._encode(negatives, length)
        repeat, rest = divmod(len(y), len(negative_y))
        if rest:
            raise ValueError(
                f"{len(negative_y)} negative prompts for {len(y)} videos: give one, or one for each prompt"
            )
        return y, mask, negative_y.repeat_interleave(repeat, dim=0), negative_mask.repeat_interleave(repeat, dim=0)

    def _encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: give prompt_embeds and prompt_attention_mask")
        return encode_captions(self.tokenizer, self.text_encoder, prompts, length)

    def _cache_text(
        self, y: Tensor, mask: Tensor, negative_y: Tensor | None, negative_mask: Tensor | None
    ) -> TextCache:
        """The text's keys and values of every block, computed once for all steps."""
        if negative_y is not None and negative_mask is not None:
            y, mask = torch.cat([y, negative_y.to(y)]), torch.cat([mask, negative_mask.to(mask)])
        hook = getattr(self.transformer, "_hf_hook", None)
        if hook is not None:  # of CPU offload, which knows of `forward` alone
            hook.pre_forward(self.transformer)
        device = self._execution_device
        return self.transformer.encode_text(y.to(device, self.transformer.dtype), mask.to(device))
