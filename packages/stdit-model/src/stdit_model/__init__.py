"""STDiT, the video diffusion transformer of Open-Sora 1.0: `from stdit_model import STDiT`."""

from typing import TYPE_CHECKING, Any

# diffusers looks for the base class of a pipeline's component in the module that its index names, which is this one.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin

from stdit_model.blocks import VARIANTS
from stdit_model.model import STDiT, TextCache
from stdit_model.presets import PRESETS

if TYPE_CHECKING:
    from stdit_model.pipeline import STDiTPipeline

# A saved pipeline records the module of each of its classes: the public name must not change with the files.
STDiT.__module__ = "stdit_model"

__all__ = ["PRESETS", "VARIANTS", "STDiT", "STDiTPipeline", "TextCache"]


def __getattr__(name: str) -> Any:
    """The pipeline needs transformers (extra `pipeline`); the network does not, so it is imported on demand."""
    if name == "STDiTPipeline":
        from stdit_model.pipeline import STDiTPipeline

        return STDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
