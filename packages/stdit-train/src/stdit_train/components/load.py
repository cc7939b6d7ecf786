"""Load the frozen models around the transformer: VAE, text encoder and tokenizer."""

import gc
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_model import CausalVideoVAE, video_vae
from stdit_model.text import encode_captions
from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import hub_options
from stdit_train.assets import resolve_source
from stdit_train.components.captions import CachedTexts
from stdit_train.components.identity import check_text_encoder, check_vae
from stdit_train.components.sources import check_path, locate, not_loaded, split_source
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError
from stdit_train.hardware import keep_freed_memory


@dataclass
class Components:
    """The frozen models of a run."""

    vae: Any
    text_encoder: Any  # None with `texts`
    tokenizer: Any  # None with `texts`
    vae_source: str
    text_source: str
    texts: CachedTexts | None = None  # states of every caption the run needs

    @property
    def caption_channels(self) -> int:
        """Width of the text encoder."""
        return self.text_encoder.config.d_model if self.texts is None else self.texts.width


def open_components(
    config: TrainConfig, dataset: ClipDataset, captions: Sequence[str], device: torch.device
) -> Components:
    """Load the frozen models of a run; the text encoder is left out where a cache has the texts.

    Args:
        config: the run's settings.
        dataset: the clips it trains on.
        captions: captions it needs besides: of validation clips and samples. Those that the cache lacks are encoded.
        device: where the models are put.

    Raises:
        ConfigError: a model cannot be loaded, or the text encoder is not the cache's.
    """
    data = config.data
    if not isinstance(dataset, LatentDataset) or dataset.texts is None or dataset.text_metadata is None:
        return load_components(data.vae, data.text_encoder, device, config.precision)
    missing = [caption for caption in dict.fromkeys(captions) if caption not in dataset.texts]
    others: dict[str, Tensor] = {}
    if missing or resolve_source(data.text_encoder) != dataset.text_metadata["text_encoder"]["source"]:
        tokenizer, encoder = load_text_encoder(data.text_encoder, device, config.precision)
        check_text_encoder(dataset, encoder, data.text_encoder)
        if missing:
            states, mask = encode_captions(tokenizer, encoder, missing, config.model.model_max_length)
            others = {caption: states[i, : int(mask[i].sum())].cpu() for i, caption in enumerate(missing)}
        del tokenizer, encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    texts = CachedTexts(dataset, text_dtype(config.precision), others)
    return Components(load_vae(data.vae, device), None, None, data.vae, data.text_encoder, texts)


def load_components(vae: str, text_encoder: str, device: torch.device, precision: str) -> Components:
    """Load the VAE in float32 and the text encoder in the precision of the run.

    Each source is a pipeline folder (with `vae`, `text_encoder`, `tokenizer`), a folder of that model, or a Hub id.

    Raises:
        ConfigError: a model cannot be found, read or fetched; the message names it.
    """
    tokenizer, encoder = load_text_encoder(text_encoder, device, precision)
    return Components(
        vae=load_vae(vae, device),
        text_encoder=encoder,
        tokenizer=tokenizer,
        vae_source=vae,
        text_source=text_encoder,
    )


def check_components(dataset: LatentDataset, components: Components) -> None:
    """Check that a run's VAE and, where it has one, its text encoder are those of a cache.

    Raises:
        ConfigError: they differ; the message names both.
    """
    check_vae(dataset, components.vae, components.vae_source)
    if components.text_encoder is not None:
        check_text_encoder(dataset, components.text_encoder, components.text_source)


def load_vae(source: str, device: torch.device, option: str = "--vae") -> Any:
    """Load an image or video VAE, of diffusers or a `CausalVideoVAE`, in float32.

    Args:
        source: its folder, a folder that has it as `vae` (of a pipeline or a run), a Hub id ("owner/name", or
            "owner/name/vae" in a pipeline's repository), or "demo".
        device: where it is put.
        option: how it was named, for the message.

    Raises:
        ConfigError: it cannot be found, read or fetched, or is no VAE.
        SettingsError: it is a VAE of diffusers that cannot be used; the message has those that can.
    """
    from diffusers import AutoModel

    if device.type == "cpu":
        keep_freed_memory()
    quiet_libraries()
    location = locate(source, "vae")
    file = Path(location) / "config.json"
    own = file.is_file() and read_json(file).get("_class_name") == CausalVideoVAE.__name__
    vae = _load(CausalVideoVAE if own else AutoModel, location, "VAE", option)
    if not hasattr(vae, "encode"):
        raise ConfigError(f"{source} is a {type(vae).__name__}, not a VAE: give one with {option}")
    video_vae.check_vae(vae)
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoder(source: str, device: torch.device, precision: str, **options: Any) -> tuple[Any, Any]:
    """Load a tokenizer and its T5 encoder, in the precision of the run.

    Args:
        source: pipeline folder, folder of the model, or Hub id.
        device: where the encoder is put, unless `options` have a `device_map`.
        precision: precision of the run.
        options: for transformers' `from_pretrained`.

    Raises:
        ConfigError: it cannot be found, read or fetched.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    if device.type == "cpu":
        keep_freed_memory()
    quiet_libraries()
    dtype = text_dtype(precision)
    location = locate(source, "text_encoder")
    encoder = _load(T5EncoderModel, location, "text encoder", "--text-encoder", dtype=dtype, **options)
    if "device_map" not in options:
        encoder = encoder.to(device)
    tokenizer = _load(AutoTokenizer, locate(source, "tokenizer"), "tokenizer", "--text-encoder")
    return tokenizer, encoder.eval().requires_grad_(False)


def text_dtype(precision: str) -> torch.dtype:
    """Return the type of the text encoder and its states in a run of a precision."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def eight_bit_config(option: str, alternative: str) -> Any:
    """Return transformers' configuration for weights in 8 bits.

    Args:
        option: command-line option that asks for it, for the message.
        alternative: option to use without bitsandbytes, for the message.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{option} needs bitsandbytes: pip install bitsandbytes, or use {alternative}")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # else it warns of a cast in every layer
    return BitsAndBytesConfig(load_in_8bit=True)


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of diffusers and transformers; errors are raised as ever."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _load(cls: Any, source: str, what: str, option: str, **kwargs: Any) -> Any:
    check_path(source, what, option)
    repo, inside = split_source(source)
    kwargs |= {"subfolder": inside} if inside else {}
    try:
        return cls.from_pretrained(repo, **hub_options(source), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise not_loaded(source, what, option, error) from error
