"""Sizes of VAEs and text encoders from their configurations, without loading them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stdit_model.errors import reason
from stdit_train.assets import resolve_source
from stdit_train.config.load import read_settings
from stdit_train.errors import ConfigError

Part = Literal["vae", "text_encoder"]


class ComponentConfig(NamedTuple):
    """Configuration and size of a frozen model.

    Attributes:
        values: arguments of diffusers' AutoencoderKL or transformers' T5Config.
        parameters: number of them.
        note: what is assumed, where the model is neither on this machine nor a published one.
    """

    values: dict[str, Any]
    parameters: int
    note: str | None = None


class Published(NamedTuple):
    """A published model, which stands in for models that are not on this machine."""

    missing: str  # the note about a model that is not on this machine
    names: tuple[str, ...]  # Hub ids
    config: ComponentConfig


PUBLISHED: dict[Part, Published] = {
    "vae": Published(
        "the VAE {} is not here: sizes of sd-vae-ft taken",
        ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"),
        ComponentConfig(
            {
                "block_out_channels": (128, 256, 512, 512),
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "layers_per_block": 2,
                "latent_channels": 4,
            },
            83_653_863,
        ),
    ),
    "text_encoder": Published(
        "the text encoder {} is not here: sizes of T5-XXL taken",
        ("DeepFloyd/t5-v1_1-xxl", "google/t5-v1_1-xxl"),
        ComponentConfig(
            {
                "d_model": 4096,
                "d_ff": 10240,
                "d_kv": 64,
                "num_heads": 64,
                "num_layers": 24,
                "vocab_size": 32128,
                "feed_forward_proj": "gated-gelu",
            },
            4_762_310_656,
        ),
    ),
}


def component_config(source: str, part: Part) -> ComponentConfig:
    """Return the configuration of a VAE or text encoder, and how many parameters it has.

    Args:
        source: a pipeline folder, a folder of the model alone, a Hub id, or "demo". A Hub id that is not in
            `PUBLISHED` counts as the published model, with a note.
        part: which of the two.

    Raises:
        ConfigError: a damaged file.
    """
    folder = Path(resolve_source(source))
    for place in (folder / part, folder):
        if (place / "config.json").is_file():
            values = read_settings(place / "config.json")
            known = {name: value for name, value in values.items() if not name.startswith("_")}
            return ComponentConfig(known, _stored_parameters(place))
    published = PUBLISHED[part]
    if source in published.names:
        return published.config
    return published.config._replace(note=published.missing.format(source))


def vae_channels(values: Mapping[str, Any]) -> int:
    """Return the channels of the latents of a VAE's configuration."""
    return int(values.get("latent_channels") or values["z_dim"])


def vae_stride(values: Mapping[str, Any]) -> int:
    """Return the pixels per latent, along height and width, of a VAE's configuration."""
    if told := values.get("scale_factor_spatial") or values.get("spatial_compression_ratio"):
        return int(told)
    if "spatial_expansions" in values:  # Mochi
        return math.prod(values["spatial_expansions"])
    if "spatio_temporal_scaling" in values:  # LTX-Video
        return int(values["patch_size"]) * 2 ** sum(values["spatio_temporal_scaling"])
    widths = values.get("block_out_channels") or values["encoder_block_out_channels"]  # the latter of DC-AE
    return 2 ** (len(widths) - 1)


def vae_frames(values: Mapping[str, Any], frames: int) -> int:
    """Return the latent frames that cover a clip, from a VAE's configuration; of an image VAE, the clip's frames."""
    ratio = values.get("scale_factor_temporal") or values.get("temporal_compression_ratio") or 1
    if "temporal_expansions" in values:
        ratio = math.prod(values["temporal_expansions"])
    elif "spatio_temporal_scaling" in values:
        ratio = int(values.get("patch_size_t", 1)) * 2 ** sum(values["spatio_temporal_scaling"])
    return -(-(frames - 1) // int(ratio)) + 1


def _stored_parameters(folder: Path) -> int:
    """Count the parameters in a folder's safetensors files, from their headers."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged: {reason(error)}") from error
    return count
