"""What a call refuses before it computes anything, and what its callbacks may do."""

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from torch import Tensor

from stdit_model import STDiTPipeline
from stdit_model.errors import SettingsError

Y, MASK = torch.zeros(2, 12, 32), torch.ones(2, 12)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames 0: expected a whole number from 1 on"),
        ({"height": 0}, "height 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps 2\.5"),
        ({"decode_chunk_size": 0}, "decode_chunk_size 0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt 0"),
        ({"space_scale": 0.0}, r"space_scale 0\.0: expected a number above 0"),
        ({"guidance_channels": 5}, "guidance_channels 5: expected 1 to 4"),
        ({"guidance_channels": -1}, "guidance_channels -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan: expected a finite number"),
        ({"guidance_rescale": 2.0}, r"guidance_rescale 2\.0: expected 0 to 1"),
        ({"generator": [seed(), seed()]}, "2 generators for 1 videos"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"]}, "3 negative prompts for 2 prompts"),
        (
            {"prompt": ["a", "b"], "negative_prompt": ["x"] * 3, "num_videos_per_prompt": 3},
            "3 negative prompts for 2 prompts",
        ),
        ({"negative_prompt": []}, "0 negative prompts for 1 prompts"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": None, "prompt_embeds": Y}, "prompt_embeds without prompt_attention_mask"),
        ({"prompt": None, "prompt_attention_mask": MASK}, "prompt_attention_mask without prompt_embeds"),
        ({"prompt_embeds": Y, "prompt_attention_mask": MASK}, "prompt and prompt_embeds: pass one of the two"),
        ({"negative_prompt_embeds": Y[:1]}, "negative_prompt_embeds without negative_prompt_attention_mask"),
        ({"prompt": None, "prompt_embeds": Y[..., :8], "prompt_attention_mask": MASK}, r"expected \[B, L, 32\]"),
        ({"prompt": None, "prompt_embeds": Y, "prompt_attention_mask": MASK[:, :5]}, r"expected \[2, 12\]"),
        ({"callback_on_step_end_tensor_inputs": ["nonsense"]}, "has no nonsense; choose of latents, prompt_embeds"),
        ({"callback_on_step_end": SDXLCFGCutoffCallback()}, "has no add_text_embeds, add_time_ids"),
        ({"output_type": "gif"}, "output_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_refused(pipeline: STDiTPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize("prompt", ["###", "https://example.com/a", "一只猫在跑", "@someone"])
def test_a_prompt_without_words(pipeline: STDiTPipeline, prompt: str) -> None:
    for arguments in ({"prompt": ["a cat", prompt]}, {"prompt": "a cat", "negative_prompt": prompt}):
        with pytest.raises(SettingsError, match=r"has no words left .*: describe the video in English"):
            pipeline(**arguments)


def test_an_empty_negative_prompt_is_a_caption(pipeline: STDiTPipeline) -> None:
    empty, null = (
        pipeline("a cat", negative, generator=seed(), output_type="latent").frames for negative in ("", None)
    )
    assert not torch.equal(empty, null)


def test_guidance_is_cut_off_by_diffusers_callback(pipeline: STDiTPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.25)  # after step 1 of 0 to 3
    cut = pipeline("a cat", generator=seed(), callback_on_step_end=callback, **arguments).frames
    assert pipeline.guidance_scale == 1.0
    assert not pipeline.do_classifier_free_guidance
    assert torch.equal(cut, pipeline("a cat", generator=seed(), guidance_stop=0.5, **arguments).frames)
    assert pipeline.guidance_scale == 3.0
    assert not torch.equal(cut, pipeline("a cat", generator=seed(), **arguments).frames)


def test_a_callback_sees_the_embeddings(pipeline: STDiTPipeline) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors)
        return {}

    names = ["latents", "prompt_embeds"]
    pipeline("a cat", num_inference_steps=1, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert list(seen[0]) == names
    assert torch.equal(seen[0]["prompt_embeds"], pipeline.encode_prompt("a cat").prompt_embeds)


def test_an_interrupt_keeps_the_step_and_what_its_callback_changed(pipeline: STDiTPipeline) -> None:
    def stop(pipe: Any, i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = i == 1
        return {"latents": torch.full_like(tensors["latents"], i)}

    assert (pipeline("x", callback_on_step_end=stop, output_type="latent").frames == 1).all()
