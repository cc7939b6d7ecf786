"""Score clips with a CLIP model: similarity of caption and picture, and aesthetics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit_data.curation.hub import loading
from stdit_data.curation.sampling import ClipFrames
from stdit_data.errors import DataError
from stdit_data.workers.executors import worker_device

FRAMES = 3  # first, middle and last


class ClipScores:
    """A CLIP model, with an aesthetic head on its image embedding if one is given.

    Args:
        model: folder or Hub id of a `CLIPModel`.
        head: the head's weights: linear layers one after another, as in LAION's improved-aesthetic-predictor
            (`sac+logos+ava1-l14-linearMSE`, which goes with CLIP ViT-L/14), .pth or .safetensors.

    Raises:
        DataError: not a CLIP model, or a head that does not fit it.
    """

    def __init__(self, model: str, head: str | None = None) -> None:
        with loading(model, "CLIP model"):
            from transformers import AutoConfig, CLIPModel, CLIPProcessor

            kind = AutoConfig.from_pretrained(model).model_type
            if kind != "clip":
                raise DataError(f"{model}: a model of kind {kind!r}; expected CLIP")
            self.device = worker_device()
            self.model = CLIPModel.from_pretrained(model).eval().to(self.device)
            self.processor = CLIPProcessor.from_pretrained(model)
        self.head = _read_head(head, self.model.config.projection_dim) if head else []

    @torch.inference_mode()
    def __call__(self, clip: ClipFrames) -> dict[str, float | None]:
        """Return the scores of three frames."""
        places = np.linspace(0, len(clip.rgb) - 1, min(FRAMES, len(clip.rgb))).round().astype(int)
        images = [Image.fromarray(clip.rgb[place]) for place in places]
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        picture = _normalised(_tensor(self.model.get_image_features(**inputs)))
        scores: dict[str, float | None] = {"clip_score": None}
        if clip.caption:
            tokens = self.processor(text=[clip.caption], truncation=True, return_tensors="pt").to(self.device)
            text = _normalised(_tensor(self.model.get_text_features(**tokens)))
            scores["clip_score"] = float((picture @ text.T).mean())
        if self.head:
            value = picture
            for weight, bias in self.head:
                value = torch.nn.functional.linear(value, weight.to(value), bias.to(value))
            scores |= {"aesthetic": float(value.mean()), "aesthetic_min": float(value.min())}
        return scores


def _tensor(features: Any) -> Tensor:
    """Return the embedding itself, which newer versions of transformers wrap in an output object."""
    return features if isinstance(features, Tensor) else cast(Tensor, features.pooler_output)


def _normalised(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _read_head(path: str, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return (weight, bias) of the linear layers in order."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        words = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not the weights of an aesthetic head ({words})") from None
    names = sorted((name for name in state if name.endswith("weight")), key=lambda name: int(name.split(".")[-2]))
    layers = [(state[name], state[name.removesuffix("weight") + "bias"]) for name in names]
    if not layers or layers[0][0].shape[1] != width or layers[-1][0].shape[0] != 1:
        shapes = ", ".join(f"{tuple(weight.shape)}" for weight, _ in layers) or "none"
        raise DataError(f"{path}: linear layers {shapes}; expected from {width} numbers, the model's embedding, to 1")
    return layers
