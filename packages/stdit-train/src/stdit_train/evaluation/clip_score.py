"""CLIP similarity of videos and their prompts: the mean over frames of the cosine of image and text (CLIPSIM).

Wu et al. 2021, "GODIVA", section 4.2; Hessel et al. 2021, "CLIPScore", without its clamp and factor.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from stdit_model.weights.hub import hub_options, hub_reason
from stdit_train.components.load import quiet_libraries
from stdit_train.errors import ConfigError
from stdit_train.evaluation.confidence import Interval, mean_interval

# Mean and standard deviation of CLIP's training images, by channel.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipSimilarity:
    """Mean cosine of frames and prompts, times 100; each video counts once.

    Args:
        model: transformers' CLIPModel.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._values: list[float] = []

    @torch.no_grad()
    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Add videos [3, T, H, W] in [-1, 1] and their prompts, which are cut to the model's longest text."""
        device = next(self.model.parameters()).device
        length = self.model.config.text_config.max_position_embeddings
        for video, prompt in zip(videos, prompts, strict=True):
            tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(device)
            images = frames_for(video, self.model.config.vision_config.image_size).to(device, self.model.dtype)
            output = self.model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=images
            )
            cosines = F.normalize(output.image_embeds, dim=-1) @ F.normalize(output.text_embeds, dim=-1).T
            self._values.append(100 * cosines.float().mean().item())

    def result(self) -> dict[str, Interval]:
        """Return the mean over videos, by the measure's name; nothing without videos."""
        return {"CLIP similarity": mean_interval(self._values)} if self._values else {}


def frames_for(video: Tensor, size: int) -> Tensor:
    """Crop a video [3, T, H, W] in [-1, 1] to its middle square and normalise it for CLIP: [T, 3, size, size]."""
    images = (video.float().transpose(0, 1) + 1) / 2
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    images = F.interpolate(images, resized, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def load_clip(source: str, device: torch.device) -> ClipSimilarity:
    """Load a CLIP model from a folder or a Hub id.

    Raises:
        ConfigError: it cannot be found, read or fetched.
    """
    from transformers import AutoTokenizer, CLIPModel

    quiet_libraries()
    try:
        model = CLIPModel.from_pretrained(source, **hub_options(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(source))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"--clip {source}: no CLIP model there ({hub_reason(error, source)}); give its folder or, with a network, "
            "a Hub id such as openai/clip-vit-base-patch32"
        ) from error
    return ClipSimilarity(model.to(device), tokenizer)
