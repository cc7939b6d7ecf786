"""Training from a cache that has all texts: their states stand in for the text encoder, which is not kept in memory.

It is loaded only to be looked at, when a run names another than the cache does, or to encode captions that the cache
lacks (those of a validation set); and it is gone again before the model is made.

L text tokens, D width of the text encoder.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_model.convert import HUB_COMPONENTS
from stdit_model.text import encode_captions
from stdit_train.components.load import Components, load_components, load_text_encoder, load_vae, text_dtype
from stdit_train.config.load import TrainConfig
from stdit_train.data.cached import check_text_encoder
from stdit_train.loss.validation import VALIDATION_CLIPS, ValidationClips

INDEX = "model_index.json"


class KnownTexts:
    """Captions to states [L, D] without padding.

    Args:
        dataset: a cache with a text part.
        dtype: of the states.
        others: captions that are not in it.
    """

    def __init__(self, dataset: LatentDataset, dtype: torch.dtype, others: dict[str, Tensor]) -> None:
        assert dataset.texts is not None
        assert dataset.about_text is not None
        self.cached, self.others, self.dtype = dataset.texts, others, dtype
        self.width = dataset.about_text["text_encoder"]["width"]

    def __call__(self, caption: str) -> Tensor:
        """States of one caption.

        Raises:
            DataError: it is not known.
        """
        states = self.others[caption] if caption in self.others else self.cached(caption)
        return states.to(self.dtype)


def open_components(
    config: TrainConfig,
    dataset: ClipDataset,
    validation: ClipDataset | None,
    prompts: list[str],
    device: torch.device,
) -> Components:
    """The frozen models of a run; without the text encoder where a cache has the texts.

    Args:
        config: of the run.
        dataset: what it trains on.
        validation: what it is validated on; those captions, and the prompts, are encoded here if the cache lacks them.
        prompts: what is sampled along the way.
        device: of the models.

    Raises:
        ConfigError: nothing there, or another text encoder than the cache's.
    """
    data = config.data
    if not isinstance(dataset, LatentDataset) or dataset.texts is None or dataset.about_text is None:
        return load_components(data.vae, data.text_encoder, device, config.precision)
    captions = [*prompts, *_captions(validation)]
    missing = [caption for caption in dict.fromkeys(captions) if caption not in dataset.texts]
    others: dict[str, Tensor] = {}
    if missing or data.text_encoder != dataset.about_text["text_encoder"]["source"]:
        tokenizer, encoder = load_text_encoder(data.text_encoder, device, config.precision)
        check_text_encoder(dataset, encoder, data.text_encoder)
        if missing:
            states, mask = encode_captions(tokenizer, encoder, missing, config.model.model_max_length)
            others = {caption: states[i, : int(mask[i].sum())].cpu() for i, caption in enumerate(missing)}
        del tokenizer, encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    texts = KnownTexts(dataset, text_dtype(config.precision), others)
    return Components(load_vae(data.vae, device), None, None, data.vae, data.text_encoder, texts)


def add_text_encoder(folder: Path, source: str) -> None:
    """Complete a pipeline folder that was written without one, and load no weights for it.

    A folder's files are copied; a hub id, or a folder that is not on this machine, is recorded by its name.
    """
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    if Path(source).is_dir():
        from transformers import AutoTokenizer

        parts = {part: _inner(Path(source), part) for part in ("text_encoder", "tokenizer")}
        shutil.copytree(parts["text_encoder"], folder / "text_encoder", ignore=shutil.ignore_patterns(".*"))
        tokenizer = AutoTokenizer.from_pretrained(parts["tokenizer"])
        tokenizer.save_pretrained(folder / "tokenizer")
        index["text_encoder"] = ["transformers", "T5EncoderModel"]
        index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    else:
        index[HUB_COMPONENTS] = {"text_encoder": source, "tokenizer": source}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _captions(validation: ClipDataset | None) -> list[str]:
    """Those of the clips that the validation loss is measured on."""
    if validation is None:
        return []
    if isinstance(validation, ValidationClips):
        return validation.captions
    known: Any = validation
    return [known.caption(index) for index in range(min(VALIDATION_CLIPS, len(validation)))]


def _inner(source: Path, part: str) -> Path:
    return source / part if (source / part).is_dir() else source
