"""The mixin that gives STDiT `from_open_sora`, `from_pixart` and a strict `from_pretrained`."""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from stdit_model.weights import load


class WeightLoaders(ModelMixin):
    """A diffusers model whose checkpoints load strictly: no tensor missing, none left over, every shape equal."""

    @classmethod
    def from_open_sora(
        cls,
        path_or_hub_id: str | Path,
        num_heads: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Self:
        """Load an Open-Sora v1.0 release: `STDiT.from_open_sora("OpenSora-v1-HQ-16x512x512.pth")`.

        The variant and all sizes are inferred from the tensors, the position scales from the position buffers if the
        file has them.

        Args:
            path_or_hub_id: a torch archive with the tensors at its top level or under `ema`, or the same tensors as
                safetensors. It may be on the Hub, as in "hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth".
            num_heads: cannot be inferred; width / 72 by default.
            dtype: of the parameters.
            overrides: constructor arguments. Position scales replace the file's, and variant="parallel" reads a "seq"
                file, whose tensors are the same; any other must agree with the file.

        Raises:
            WeightsFileNotFoundError: no such file.
            WeightsError: another layout; a key missing, unexpected or of another shape; or an override that
                contradicts the file.
        """
        return load.build(cls, load.open_sora_weights(cls, path_or_hub_id, num_heads, **overrides), dtype)

    @classmethod
    def from_pixart(
        cls,
        path_or_hub_id: str | Path,
        num_heads: int | None = None,
        *,
        ema: bool = False,
        null_caption: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Self:
        """Start a video model from PixArt-alpha's image model.

        For "seq" (the default) and "parallel", the projection of the new temporal attention is zero, so that the
        output on T frames equals PixArt's on each of them. "dit" takes every weight, "latte" all but the
        self-attention of its odd blocks; neither reproduces PixArt's output.

        Args:
            path_or_hub_id: the original .pth, or a folder (or Hub id) in diffusers' layout.
            num_heads: by default that of config.json, else width / 72.
            ema: read `state_dict_ema` of a .pth instead of `state_dict`.
            null_caption: [L, caption_channels], the text encoder's states of the empty prompt, which replace the
                file's null caption. diffusers' layout has none: it stays random then, with a warning.
            dtype: of the parameters.
            overrides: constructor arguments, such as `variant` and the position scales; sizes must agree with the
                file.

        Raises:
            WeightsFileNotFoundError: no such file.
            WeightsError: another layout; a key missing, unexpected or of another shape; or an override that
                contradicts the file.
        """
        weights = load.pixart_weights(cls, path_or_hub_id, num_heads, ema=ema, null_caption=null_caption, **overrides)
        load.warn_of_random_null_caption(weights)
        return load.build(cls, weights, dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model written by `save_pretrained` or `push_to_hub`, as diffusers does, but strictly.

        Args:
            pretrained_model_name_or_path: its folder, or a Hub id.
            options: of diffusers' `ModelMixin.from_pretrained`, such as dtype, subfolder, revision, device_map.

        Raises:
            WeightsFileNotFoundError: no such folder, or no config.json or weights in it.
            WeightsError: tensors missing, unexpected or of another shape; or the download from the Hub failed.
        """
        folder, options = load.checked_folder(cls, pretrained_model_name_or_path, options)
        loading: Any = super()
        if not options["low_cpu_mem_usage"]:  # with which diffusers cannot keep some weights in float32
            loading = super(WeightLoaders, type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None}))
        loaded = loading.from_pretrained(folder, **options)
        (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = cls
        load.check_finite(loaded[0] if isinstance(loaded, tuple) else loaded, folder)  # with output_loading_info
        return loaded
