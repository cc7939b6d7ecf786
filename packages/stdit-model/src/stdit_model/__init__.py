"""STDiT, the video diffusion transformer of Open-Sora 1.0: `from stdit_model import STDiT`."""

from stdit_model.blocks import VARIANTS
from stdit_model.model import STDiT, TextCache
from stdit_model.presets import PRESETS

# A saved pipeline records the module of each of its classes: the public name must not change with the files.
STDiT.__module__ = "stdit_model"

__all__ = ["PRESETS", "VARIANTS", "STDiT", "TextCache"]
