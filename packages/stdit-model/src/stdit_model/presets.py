"""Named sizes of the DiT family (Peebles & Xie 2023, table 1) and of the bundled demo, and the variants.

A name has the width class and the spatial patch size, as in the papers: "XL/2" is DiT-XL with 2x2 patches.
"""

from typing import Any, Literal, get_args

from stdit_model.errors import SettingsError

Variant = Literal["dit", "seq", "parallel", "latte"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)  # described in stdit_model.blocks

PRESETS: dict[str, dict[str, Any]] = {
    "XL/2": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L/2": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B/2": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S/2": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    # For 64x64 pixels on a CPU, trained with rectified flow, which needs no variance channels.
    "demo": {
        "depth": 4,
        "hidden_size": 96,
        "num_heads": 4,
        "caption_channels": 64,
        "model_max_length": 16,
        "learn_sigma": False,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Return the constructor arguments of `STDiT` for a named size.

    Raises:
        SettingsError: unknown preset.
    """
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
