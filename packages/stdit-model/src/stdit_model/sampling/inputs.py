"""Check the arguments of a pipeline's call before anything is computed.

Legend: B videos, L text tokens, Dc width of the text encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stdit_model.errors import SettingsError
from stdit_model.text import clean_caption

if TYPE_CHECKING:  # prompts are checked without torch
    import torch
    from torch import Tensor

    from stdit_model.sampling.denoise import Guidance

    Embeds = tuple[Tensor | None, Tensor | None]  # states [B, L, Dc] and mask [B, L]

OUTPUT_TYPES = ("pt", "np", "pil", "latent")
Texts = str | Sequence[str] | None


def check_inputs(
    model: Any,
    texts: Mapping[str, tuple[Texts, Embeds]],
    guidance: Guidance,
    generator: torch.Generator | list[torch.Generator] | None,
    output_type: str,
    counts: Mapping[str, int | None],
    scales: Mapping[str, float | None],
) -> None:
    """Check the arguments of a call.

    Args:
        model: config of the transformer.
        texts: of "prompt" and "negative_prompt": text, and embeddings in its place.
        guidance: see `Guidance`.
        generator: one, or one for each video.
        output_type: of `STDiTPipeline.__call__`.
        counts: whole numbers from 1 on, by name; None for arguments that are not passed.
        scales: numbers above 0, likewise.

    Raises:
        SettingsError: the first that does not fit.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise SettingsError(f"{name} {count!r}: expected a whole number from 1 on")
    for name, scale in scales.items():
        if scale is not None and not 0.0 < scale < math.inf:
            raise SettingsError(f"{name} {scale}: expected a number above 0")
    if output_type not in OUTPUT_TYPES:
        raise SettingsError(f"unknown output_type {output_type!r}: choose {', '.join(OUTPUT_TYPES)}")
    _check_guidance(guidance, model.in_channels)
    for name, (text, embeds) in texts.items():
        _check_embeds(name, text, embeds, model.caption_channels)
    prompts, negatives = (_number(*texts[name]) for name in ("prompt", "negative_prompt"))
    if prompts is None:
        raise SettingsError("no prompt: pass prompt, or prompt_embeds and prompt_attention_mask")
    if negatives is not None:
        check_number(negatives, prompts)
    videos = prompts * (counts["num_videos_per_prompt"] or 1)
    if isinstance(generator, list) and len(generator) != videos:
        raise SettingsError(f"{len(generator)} generators for {videos} videos: pass one, or one for each video")


def check_prompts(prompts: Sequence[str], kind: str = "prompt") -> None:
    """Check that each prompt says something to the text encoder; a negative prompt may be "", the empty caption.

    Raises:
        SettingsError: there is none, or one has no words.
    """
    negative = kind != "prompt"
    if not prompts or (not negative and not all(prompt.strip() for prompt in prompts)):
        raise SettingsError(f"the {kind} is empty: say what the video should {'not ' * negative}show")
    for prompt in prompts:
        if prompt.strip() and not clean_caption(prompt):
            raise SettingsError(
                f"the {kind} {prompt!r} has no words left without URLs, file names, CJK characters and symbols, which "
                "the text encoder does not get: describe the video in English"
            )


def check_number(negatives: int, prompts: int) -> None:
    """Check that there is one negative prompt, or one for each prompt.

    Raises:
        SettingsError: another number of them.
    """
    if negatives not in (1, prompts):
        raise SettingsError(f"{negatives} negative prompts for {prompts} prompts: pass one, or one for each prompt")


def callback_inputs(callback: Callable[..., Any] | None, asked: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """Return the names of the tensors that a callback gets; diffusers' own classes name theirs.

    Raises:
        SettingsError: one that the pipeline does not have.
    """
    names: Sequence[str] = getattr(callback, "tensor_inputs", asked)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(
            f"callback_on_step_end_tensor_inputs: this pipeline has no {', '.join(unknown)}; choose of "
            f"{', '.join(known)}"
        )
    return names


def _check_guidance(guidance: Guidance, channels: int) -> None:
    start, stop = guidance.start, guidance.stop
    if not math.isfinite(guidance.guidance_scale):
        raise SettingsError(f"guidance_scale {guidance.guidance_scale}: expected a finite number")
    if not 0.0 <= start < stop <= 1.0:
        raise SettingsError(f"guidance_start {start}, guidance_stop {stop}: expected shares of the steps, as 0.1, 0.7")
    if not 0.0 <= guidance.guidance_rescale <= 1.0:
        raise SettingsError(f"guidance_rescale {guidance.guidance_rescale}: expected 0 to 1")
    if guidance.channels is not None and not 1 <= guidance.channels <= channels:
        raise SettingsError(f"guidance_channels {guidance.channels}: expected 1 to {channels}, the latents' channels")


def _check_embeds(name: str, text: Texts, embeds: Embeds, width: int) -> None:
    """Check that there is either a text or both its states and mask; a mask alone is that of the null caption."""
    states, mask = embeds
    if states is None:
        if name == "prompt" and mask is not None:
            raise SettingsError("prompt_attention_mask without prompt_embeds: pass both, as encode_prompt returns them")
        return
    if text is not None:
        raise SettingsError(f"{name} and {name}_embeds: pass one of the two")
    if mask is None:
        raise SettingsError(f"{name}_embeds without {name}_attention_mask: pass both, as encode_prompt returns them")
    if states.ndim != 3 or states.shape[2] != width:
        raise SettingsError(f"{name}_embeds of shape {list(states.shape)}: expected [B, L, {width}]")
    if mask.shape != states.shape[:2]:
        expected = list(states.shape[:2])
        raise SettingsError(f"{name}_attention_mask of shape {list(mask.shape)}: expected {expected}")


def _number(text: Texts, embeds: Embeds) -> int | None:
    if embeds[0] is not None:
        return len(embeds[0])
    return None if text is None else 1 if isinstance(text, str) else len(text)
