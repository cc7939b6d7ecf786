"""The frozen models around the transformer: VAE, text encoder, tokenizer; and the scheduler that fits an objective."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stdit_model.convert import iddpm_scheduler
from stdit_model.text import encode_captions
from stdit_train.config.load import ConfigError, ObjectiveConfig

if TYPE_CHECKING:
    from stdit_train.cached_texts import KnownTexts


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


class TextMemory:
    """Captions to text-encoder states; each distinct caption is encoded once and kept, in memory, up to a limit."""

    def __init__(self, components: Components, max_length: int, limit: int = 20_000) -> None:
        self.components = components
        self.max_length = max_length
        self.limit = limit
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._given: dict[str, Tensor] = {}

    def give(self, captions: list[str], states: list[Tensor] | None) -> None:
        """Take the states of a batch, [L, Dc] without padding, from a cache; they are kept until the next batch."""
        self._given = dict(zip(captions, states, strict=True)) if states else {}

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, Dc] and mask [B, L]."""
        if self._given and all(caption in self._given for caption in captions):
            return self._pad([self._given[caption] for caption in captions])
        if self.components.texts is not None:
            return self._pad([self.components.texts(caption) for caption in captions])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) + len(new) > self.limit:
            self._known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            parts = self.components
            y, mask = encode_captions(parts.tokenizer, parts.text_encoder, new, self.max_length)
            self._known.update({caption: (y[i], mask[i]) for i, caption in enumerate(new)})
        states, masks = zip(*(self._known[caption] for caption in captions), strict=True)
        return torch.stack(states), torch.stack(masks)

    def _pad(self, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        known = self.components.texts
        dtype = self.components.text_encoder.dtype if known is None else known.dtype
        states = torch.zeros(len(texts), self.max_length, texts[0].shape[-1], dtype=dtype)
        mask = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for i, text in enumerate(texts):
            states[i, : len(text)] = text
            mask[i, : len(text)] = 1
        return states, mask


def build_scheduler(objective: ObjectiveConfig) -> Any:
    """The diffusers scheduler that samples what an objective trains."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if objective.name == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=objective.shift)
    return iddpm_scheduler()
