"""Sizes of VAEs and text encoders from their configurations, without loading them.

A VAE's configuration has its class as `_class_name`; one without is an AutoencoderKL.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stdit_model.causal_vae.latent_counts import covering_latents, latents_at_once
from stdit_model.errors import reason
from stdit_train.assets import resolve_source
from stdit_train.config.batches import step_batches
from stdit_train.config.load import read_settings
from stdit_train.config.resolve import is_cached
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

Part = Literal["vae", "text_encoder"]
CLASS = "_class_name"


class ComponentConfig(NamedTuple):
    """Configuration and size of a frozen model.

    Attributes:
        values: arguments of diffusers' AutoencoderKL, or of the VAE that they name, or of transformers' T5Config.
        parameters: number of them.
        note: what is assumed, where the model is neither on this machine nor a published one.
    """

    values: dict[str, Any]
    parameters: int
    note: str | None = None


SD_VAE = ComponentConfig(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    83_653_863,
)
T5_XXL = ComponentConfig(
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
)
WAN_VAE = ComponentConfig(
    {"_class_name": "AutoencoderKLWan", "z_dim": 16, "scale_factor_spatial": 8, "scale_factor_temporal": 4}, 126_892_531
)
COGVIDEOX_VAE = ComponentConfig(
    {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": (128, 256, 256, 512),
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "layers_per_block": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
    },
    215_583_907,
)
# Published models by Hub id; the first of each stands in for those that are not on this machine.
PUBLISHED: dict[Part, dict[str, ComponentConfig]] = {
    "vae": {
        "stabilityai/sd-vae-ft-ema": SD_VAE,
        "stabilityai/sd-vae-ft-mse": SD_VAE,
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae": WAN_VAE,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers/vae": WAN_VAE,
        "zai-org/CogVideoX-2b/vae": COGVIDEOX_VAE,
        "zai-org/CogVideoX-5b/vae": COGVIDEOX_VAE,
    },
    "text_encoder": {"DeepFloyd/t5-v1_1-xxl": T5_XXL, "google/t5-v1_1-xxl": T5_XXL},
}
_MISSING: dict[Part, str] = {
    "vae": "the VAE {} is not here: sizes of sd-vae-ft taken",
    "text_encoder": "the text encoder {} is not here: sizes of T5-XXL taken",
}


def component_config(source: str, part: Part) -> ComponentConfig:
    """Return the configuration of a VAE or text encoder, and how many parameters it has.

    Args:
        source: a pipeline folder, a folder of the model alone, a Hub id, or "demo". A Hub id that is not in
            `PUBLISHED` counts as the published model, with a note.
        part: which of the two.

    Raises:
        ConfigError: a damaged file, or one of another model.
    """
    folder = Path(resolve_source(source))
    for place in (folder / part, folder):
        if (place / "config.json").is_file():
            values = read_settings(place / "config.json")
            check_part(values, source, part, f"--set data.{part}=...")
            known = {name: value for name, value in values.items() if not name.startswith("_") or name == CLASS}
            return ComponentConfig(known, _stored_parameters(place))
    published = PUBLISHED[part]
    if source in published:
        return published[source]
    return next(iter(published.values()))._replace(note=_MISSING[part].format(source))


def check_part(values: Mapping[str, Any], source: str, part: Part, option: str) -> None:
    """Check by its configuration that a model is a VAE or a T5 encoder; `option` is how its `source` was named.

    Raises:
        ConfigError: it is another model; the message names it.
    """
    if part == "vae":
        what, fits = "VAE", bool(values.get("latent_channels") or values.get("z_dim"))
    else:
        what, fits = "text encoder", "d_model" in values
    if not fits:
        kind = values.get(CLASS) or next(iter(values.get("architectures") or ()), None) or "another model"
        raise ConfigError(f"{source} is no {what}, its config.json is of {kind}: give a {what} with {option}")


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
    return covering_latents(frames, _temporal_stride(values), latents_at_once(str(values.get(CLASS))))


def check_clips(config: TrainConfig, values: Mapping[str, Any] | None = None) -> None:
    """Check that the clips of a run of the transformer fill the latents of its VAE, unless they are in a cache.

    Args:
        config: settings of the run.
        values: the VAE's configuration. [default: as `component_config` finds it]

    Raises:
        ConfigError: they do not; the message has the nearest numbers of frames that do.
    """
    if config.network == "vae" or is_cached(config):
        return
    values = component_config(config.data.vae, "vae").values if values is None else values
    for bucket in step_batches(config):
        check_vae_frames(values, bucket.frames)


def check_vae_frames(values: Mapping[str, Any], frames: int) -> None:
    """Check that a clip's frames fill the latents of a VAE, from its configuration.

    Raises:
        ConfigError: they do not; the message has the nearest numbers that do.
    """
    unit = latents_at_once(str(values.get(CLASS))) * _temporal_stride(values)
    if (frames - 1) % unit:
        low = (frames - 1) // unit * unit + 1
        raise ConfigError(
            f"{frames} frames: the VAE takes 1 + a multiple of {unit}, the nearest are {low} and {low + unit} "
            "(data.frames, data.buckets)"
        )


def _temporal_stride(values: Mapping[str, Any]) -> int:
    if "temporal_expansions" in values:  # Mochi
        return math.prod(values["temporal_expansions"])
    if "spatio_temporal_scaling" in values:  # LTX-Video
        return int(values.get("patch_size_t", 1)) * int(2 ** sum(values["spatio_temporal_scaling"]))
    return int(values.get("scale_factor_temporal") or values.get("temporal_compression_ratio") or 1)


def _stored_parameters(folder: Path) -> int:
    """Count the parameters in a folder's safetensors files, from their headers."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "np") as tensors:  # without torch
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged: {reason(error)}") from error
    return count
