"""`stdit data caption` with a tiny random model of each family of captioners."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from stdit_data.video.write import write_mp4

# The chat as the family's template writes it, with IMAGE where an image is; its token; what has an entry per image.
TURN = "<|im_start|> user IMAGE IMAGE IMAGE describe <unk> red <|im_end|> <|im_start|> assistant"
QWEN = TURN.replace("IMAGE", "<|vision_start|> IMAGE <|vision_end|>")
FAMILIES = {
    "llava": ("USER: IMAGE IMAGE IMAGE describe <unk> red ASSISTANT:", "<image>", "pixel_values"),
    "llava_next": ("[INST] IMAGE IMAGE IMAGE describe <unk> red [/INST]", "<image>", "image_sizes"),
    "llava_onevision": (TURN, "<image>", "image_sizes"),
    "qwen2_vl": (QWEN, "<|image_pad|>", "image_grid_thw"),
    "qwen2_5_vl": (QWEN, "<|image_pad|>", "image_grid_thw"),
}


@pytest.fixture
def clips(tmp_path: Path) -> None:
    """Two clips, one of which has a caption."""
    (tmp_path / "clips").mkdir()
    picture = torch.rand(3, 1, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for name in ("captioned", "plain"):
        video = (picture + torch.linspace(-1, 1, 24)[:, None, None]).clamp(-1, 1)
        write_mp4(tmp_path / "clips" / f"{name}.mp4", video, 8)
    (tmp_path / "clips" / "captioned.txt").write_text("a red circle")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("clips")
def test_three_images_reach_a_model_of_each_family(
    stdit: Callable, captioner: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor, GenerationMixin

    given: list[dict[str, Any]] = []
    generate = GenerationMixin.generate

    def watched(self: Any, **inputs: Any) -> Any:
        given.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    folder = captioner(family)
    options = ["--model", folder, "--prompt", "describe {count} red", "--max-tokens", 8]
    done = stdit("data", "caption", "clips", "out.parquet", *options)
    assert done.code == 0, done
    rows = pq.read_table("out.parquet").to_pylist()
    assert rows[0]["caption"] == "a red circle"
    assert rows[1]["caption"] or rows[1]["caption_flag"] == "empty"
    (inputs,) = given  # of the clip without a caption
    chat, token, counted = FAMILIES[family]
    assert len(inputs[counted]) == 3
    words = AutoProcessor.from_pretrained(folder).tokenizer.batch_decode(inputs["input_ids"])[0].split()
    tokens = words.count(token)
    assert tokens >= 3
    assert tokens % 3 == 0
    assert words == chat.replace("IMAGE", " ".join([token] * (tokens // 3))).split()
