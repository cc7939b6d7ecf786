""""""

import json
from pathlib import Path
from typing import Any

from stdit_train.assets import resolve_source

# The published configurations of T5 v1.1 XXL's encoder and of sd-vae-ft-ema.
T5_XXL: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


def component_folders(source: str, part: str) -> tuple[Path, Path]:
    """Where a component's files may lie: in a folder of a pipeline, or in a folder of their own."""
    folder = Path(resolve_source(source))
    return folder / part, folder


def component_arguments(source: str, part: str) -> dict[str, Any] | None:
    """The configuration of a part in a folder; None where there is no such folder."""
    for folder in component_folders(source, part):
        if (folder / "config.json").is_file():
            values = json.loads((folder / "config.json").read_text())
            return {name: value for name, value in values.items() if not name.startswith("_")}
    return None


# Read from the published configurations: latent channels, pixels per latent, parameters; caption width, parameters.
_KNOWN_VAES = {"stabilityai/sd-vae-ft-ema": (4, 8, 83_653_863), "stabilityai/sd-vae-ft-mse": (4, 8, 83_653_863)}


_KNOWN_TEXT_ENCODERS = {"DeepFloyd/t5-v1_1-xxl": (4096, 4_762_310_656), "google/t5-v1_1-xxl": (4096, 4_762_310_656)}


def _component_config(source: str, part: str) -> dict[str, Any] | None:
    for folder in component_folders(source, part):
        if (folder / "config.json").is_file():
            return {"folder": folder, **json.loads((folder / "config.json").read_text())}
    return None


def _stored_parameters(folder: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                size = 1
                for extent in tensors.get_slice(name).get_shape():
                    size *= extent
                count += size
    return count


def _vae(source: str, assumed: list[str]) -> tuple[int, int, int]:
    """Latent channels, pixels per latent, parameters."""
    config = _component_config(source, "vae")
    if config is not None:
        stride = 2 ** (len(config["block_out_channels"]) - 1)
        return config["latent_channels"], stride, _stored_parameters(config["folder"])
    if source not in _KNOWN_VAES:
        assumed.append(f"the VAE {source} is not here: sizes of sd-vae-ft taken")
    return _KNOWN_VAES.get(source, _KNOWN_VAES["stabilityai/sd-vae-ft-ema"])


def _text_encoder(source: str, assumed: list[str]) -> tuple[int, int]:
    """Caption width, parameters."""
    config = _component_config(source, "text_encoder")
    if config is not None:
        return config["d_model"], _stored_parameters(config["folder"])
    if source not in _KNOWN_TEXT_ENCODERS:
        assumed.append(f"the text encoder {source} is not here: sizes of T5-XXL taken")
    return _KNOWN_TEXT_ENCODERS.get(source, _KNOWN_TEXT_ENCODERS["DeepFloyd/t5-v1_1-xxl"])
