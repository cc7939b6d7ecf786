"""STDiT, the video diffusion transformer of Open-Sora 1.0: `from stdit_model import STDiT`.

Names are imported when they are first used, so that `import stdit_model` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdit_model.causal_vae.video_autoencoder import CausalVideoVAE
    from stdit_model.layers import TextCache
    from stdit_model.model import STDiT
    from stdit_model.presets import PRESETS, VARIANTS
    from stdit_model.sampling.pipeline import STDiTPipeline

__all__ = ["PRESETS", "VARIANTS", "CausalVideoVAE", "STDiT", "STDiTPipeline", "TextCache"]

_MODULES = {
    "CausalVideoVAE": "stdit_model.causal_vae.video_autoencoder",
    "PRESETS": "stdit_model.presets",
    "STDiT": "stdit_model.model",
    "STDiTPipeline": "stdit_model.sampling.pipeline",  # needs transformers (extra `pipeline`)
    "TextCache": "stdit_model.layers",
    "VARIANTS": "stdit_model.presets",
    # diffusers looks for the base class of a pipeline's component in the module that its index names: this one.
    "ModelMixin": "diffusers.models.modeling_utils",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
