"""Local captioners: tiny random models of each family, laid out as its checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdit_data.curation.caption import CaptionStep, checked
from stdit_data.curation.captioners.prompts import Question
from stdit_data.errors import DataError

pytest.importorskip("torchvision", reason="an extra of stdit-data")

FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"]


def pictures(count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (40, 60, 3), np.uint8) for _ in range(count)]


def questions() -> list[Question]:
    asked = ((3, 7), (1, 8), (3, 9), (3, 9))
    return [Question(pictures(images, i), "describe a circle", seed) for i, (images, seed) in enumerate(asked)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_seed_and_not_on_the_batch(captioner: Callable[..., Path], family: str) -> None:
    from stdit_data.curation.captioners.local import LocalCaptioner

    folder = str(captioner(family))
    model = LocalCaptioner(folder, temperature=1.0, max_tokens=12)
    together = model(questions())
    assert together == [model([question])[0] for question in questions()]
    assert together[0].text != together[2].text
    assert all(answer.text and not answer.failure for answer in together if not answer.finished)
    same = [Question(pictures(3), "describe a circle", seed) for seed in (9, 10)]
    greedy = LocalCaptioner(folder, temperature=0.0, max_tokens=4)(same)
    assert greedy[0].text == greedy[1].text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_image_changes_what_the_model_says(captioner: Callable[..., Path], family: str) -> None:
    from stdit_data.curation.captioners.local import LocalCaptioner, make_inputs

    model = LocalCaptioner(str(captioner(family)), temperature=0.0, max_tokens=1)

    @torch.inference_mode()
    def logits(images: list[np.ndarray[Any, Any]]) -> torch.Tensor:
        inputs = make_inputs(model.processor, family, [Question(images, "describe a circle", 0)])
        return model.model(**inputs).logits[0, -1]

    given, others = pictures(3), pictures(3, seed=1)
    before = logits(given)
    assert torch.equal(logits(given), before)
    for place in range(3):
        changed = [others[place] if i == place else image for i, image in enumerate(given)]
        assert (logits(changed) - before).abs().max() > 1e-5, place


def test_what_is_no_captioner_is_refused_by_name(
    captioner: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPConfig, T5Config

    for config in (CLIPConfig(), T5Config()):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(
            DataError, match=f"{config.model_type}: a model of kind '{config.model_type}' is no captioner"
        ):
            checked(CaptionStep(model=str(tmp_path / config.model_type)))
    first_only = captioner(
        "llava", chat_template="{% for part in messages[0].content[2:] %}{{ part.text or '<image>' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="its chat template takes 1 of 3 images"):
        checked(CaptionStep(model=str(first_only)))
    (first_only / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="without a chat template"):
        checked(CaptionStep(model=str(first_only)))
    with pytest.raises(DataError, match="no captioner"):
        checked(CaptionStep(model=str(tmp_path / "none")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/captioner: no such folder.* HF_HUB_OFFLINE is set") as said:
        checked(CaptionStep(model="nobody/captioner"))
    assert "\n" not in str(said.value)
