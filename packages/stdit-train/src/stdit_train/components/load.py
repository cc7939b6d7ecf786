"""The frozen models around the transformer: VAE, text encoder, tokenizer; and the scheduler that fits an objective."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stdit_model.text import encode_captions
from stdit_train.config.load import ConfigError

if TYPE_CHECKING:
    from stdit_train.components.captions import KnownTexts
import gc

from stdit_data.clip import ClipDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_train.components.captions import KnownTexts
from stdit_train.components.identity import check_text_encoder
from stdit_train.config.schema import TrainConfig
from stdit_train.data.holdout import VALIDATION_CLIPS, ValidationClips


@dataclass
class Components:
    """What stays fixed in training."""

    vae: Any
    text_encoder: Any  # None, like the tokenizer, where there are `texts`
    tokenizer: Any
    vae_source: str
    text_source: str
    texts: "KnownTexts | None" = None  # what the text encoder would make of every caption that is needed

    @property
    def caption_channels(self) -> int:
        """Width of the text encoder."""
        return self.text_encoder.config.d_model if self.texts is None else self.texts.width


def load_components(vae: str, text_encoder: str, device: torch.device, precision: str) -> Components:
    """Load the frozen models, the VAE in float32, the text encoder in the precision of the run.

    Each from a pipeline folder (its `vae`, `text_encoder`, `tokenizer`), a folder of the model alone, or
    a hub id.

    Raises:
        ConfigError: nothing there, or nothing to be had offline; the message says what was looked for.
    """
    tokenizer, encoder = load_text_encoder(text_encoder, device, precision)
    return Components(
        vae=load_vae(vae, device),
        text_encoder=encoder,
        tokenizer=tokenizer,
        vae_source=vae,
        text_source=text_encoder,
    )


def load_vae(source: str, device: torch.device) -> Any:
    """An image or video VAE of diffusers, in float32.

    Raises:
        ConfigError: nothing there, or a model that is no VAE.
    """
    from diffusers import AutoModel

    quiet_libraries()
    vae = _load(AutoModel, _location(source, "vae"), "VAE", "--vae")
    if not hasattr(vae, "encode"):
        raise ConfigError(f"{source} is a {type(vae).__name__}, not a VAE: give one with --vae")
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoder(source: str, device: torch.device, precision: str, **options: Any) -> tuple[Any, Any]:
    """Tokenizer and T5-style encoder, in the precision of the run; `options` go to transformers' `from_pretrained`.

    Raises:
        ConfigError: nothing there.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    quiet_libraries()
    dtype = text_dtype(precision)
    location = _location(source, "text_encoder")
    encoder = _load(T5EncoderModel, location, "text encoder", "--text-encoder", dtype=dtype, **options)
    if "device_map" not in options:  # else it is placed already
        encoder = encoder.to(device)
    tokenizer = _load(AutoTokenizer, _location(source, "tokenizer"), "tokenizer", "--text-encoder")
    return tokenizer, encoder.eval().requires_grad_(False)


def text_dtype(precision: str) -> torch.dtype:
    """Of the text encoder, and its states, in a run of this precision."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def quiet_libraries() -> None:
    """No progress bars and warnings of diffusers and transformers between our lines; errors are raised anyway."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _location(source: str, part: str) -> dict[str, str]:
    """Where a part lies: a subfolder of a pipeline folder, else the place itself."""
    if (Path(source) / part).is_dir():
        return {"pretrained_model_name_or_path": str(Path(source) / part)}
    return {"pretrained_model_name_or_path": source}


def _load(cls: Any, location: dict[str, str], what: str, option: str, **kwargs: Any) -> Any:
    source = location["pretrained_model_name_or_path"]
    if (source.startswith((".", "/", "~")) or source.count("/") != 1) and not Path(source).exists():
        raise ConfigError(f"no {what} at {source}: give a folder or a hub id with {option}")
    try:
        return cls.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load the {what} {source!r}: {reason}. Download it where there is a network "
            f"(hf download {source}), or give a folder with {option}; `{option} demo` is the bundled one"
        ) from error


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


def _captions(validation: ClipDataset | None) -> list[str]:
    """Those of the clips that the validation loss is measured on."""
    if validation is None:
        return []
    if isinstance(validation, ValidationClips):
        return validation.captions
    known: Any = validation
    return [known.caption(index) for index in range(min(VALIDATION_CLIPS, len(validation)))]
