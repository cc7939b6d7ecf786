"""The frozen models around the transformer: VAE, text encoder, tokenizer; and the scheduler that fits an objective."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_model.convert import iddpm_scheduler
from stdit_model.text import encode_captions
from stdit_train.config import ConfigError, ObjectiveConfig


@dataclass
class Components:
    """What stays fixed in training."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    vae_source: str
    text_source: str


def load_components(vae: str, text_encoder: str, device: torch.device, precision: str) -> Components:
    """Load the frozen models, the VAE in float32, the text encoder in the precision of the run.

    Each from a pipeline folder (its `vae`, `text_encoder`, `tokenizer`), a folder of the model alone, or
    a hub id.

    Raises:
        ConfigError: nothing there, or nothing to be had offline; the message says what was looked for.
    """
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    quiet_libraries()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vae_args = _location(vae, "vae")
    text_args, tokenizer_args = _location(text_encoder, "text_encoder"), _location(text_encoder, "tokenizer")
    return Components(
        vae=_load(AutoencoderKL, vae_args, "VAE", "--vae").to(device).eval().requires_grad_(False),
        text_encoder=_load(T5EncoderModel, text_args, "text encoder", "--text-encoder", dtype=dtype)
        .to(device)
        .eval()
        .requires_grad_(False),
        tokenizer=_load(AutoTokenizer, tokenizer_args, "tokenizer", "--text-encoder"),
        vae_source=vae,
        text_source=text_encoder,
    )


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

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, Dc] and mask [B, L]."""
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


def build_scheduler(objective: ObjectiveConfig) -> Any:
    """The diffusers scheduler that samples what an objective trains."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if objective.name == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=objective.shift)
    return iddpm_scheduler()
