"""STDiT, the spatial-temporal diffusion transformer of Open-Sora 1.0, and its three relatives.

Legend: B batch, C latent channels, T frames, H W height and width, S tokens per frame, L text tokens, D width, N heads,
K head width.
"""

import inspect
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn

from stdit_model.blocks import Block, mixings
from stdit_model.embed import (
    CaptionEmbedder,
    Float32Linear,
    PatchEmbed3D,
    TimestepEmbedder,
    spatial_positions,
    temporal_positions,
)
from stdit_model.errors import SettingsError, WeightsError, few
from stdit_model.layers import BlockText, FinalLayer, TextCache
from stdit_model.presets import Variant, preset
from stdit_model.weights.loaders import WeightLoaders

CACHES = (
    "FirstBlockCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
    "MagCacheConfig",
    "TaylorSeerCacheConfig",
)


class STDiT(WeightLoaders, PeftAdapterMixin, CacheMixin, ConfigMixin):
    """A video diffusion transformer over latents.

    Args:
        variant: how tokens are mixed: "seq" (Open-Sora 1.0), "parallel", "dit" (full attention) or "latte"; see
            `stdit_model.blocks`.
        depth: number of blocks; for latte both kinds are counted.
        hidden_size: width D, a multiple of 4 (for the 2-D sin-cos positions) and of `num_heads`.
        num_heads: number of attention heads N.
        patch_size: frames, rows and columns of a patch; (1, 2, 2) as published, (2, 2, 2) for 3-D patches.
        in_channels: latent channels C.
        learn_sigma: predict 2C channels, the second half of them the interpolated log variance (iDDPM); else C.
        mlp_ratio: hidden width of the MLP, as a multiple of D.
        caption_channels: width of the text encoder's states, 4096 for T5-XXL.
        model_max_length: text tokens of the null caption.
        space_scale, time_scale: default position scales; positions are index / scale.

    The latte variant follows the report's description of Latte. It differs from diffusers' LatteTransformer3DModel as
    follows: its temporal blocks have cross-attention too (without it the two are equal); `depth` counts both kinds of
    block, where theirs has two for each of `num_layers`; theirs has unscaled temporal positions for exactly
    `video_length` frames, and none for a single frame; and theirs stretches spatial positions to its native
    `sample_size`, where ours are index / space_scale.

    Raises:
        SettingsError: a `hidden_size` that is not such a multiple, or an unknown variant.

    Sources: Open-Sora 1.0 report (STDiT); DiT, arXiv:2212.09748; PixArt-alpha, arXiv:2310.00426; Latte,
    arXiv:2401.03048.
    """

    blocks: MutableSequence[Block]  # an nn.ModuleList, typed by what it holds
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers reads these from the class)
    _repeated_blocks = ["Block"]  # noqa: RUF012
    _supports_gradient_checkpointing = True
    # The path of the timestep keeps its precision in a model that is quantised or cast as it is loaded.
    _keep_in_fp32_modules = ["t_embedder", "t_block", "scale_shift_table"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ("x_embedder", "t_embedder", "t_block", "final_layer", "norm")

    @register_to_config
    def __init__(
        self,
        variant: Variant = "seq",
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 4,
        learn_sigma: bool = True,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise SettingsError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if hidden_size % 4:
            raise SettingsError(f"hidden_size {hidden_size} is not a multiple of 4, as 2-D sin-cos positions need")
        patch_t, patch_h, patch_w = patch_size
        self.register_to_config(patch_size=(patch_t, patch_h, patch_w))  # JSON would have made it a list
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed3D(in_channels, hidden_size, (patch_t, patch_h, patch_w))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), Float32Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        blocks = (Block(hidden_size, num_heads, mlp_ratio, mixing) for mixing in mixings(variant, depth))
        self.blocks = cast("MutableSequence[Block]", nn.ModuleList(blocks))
        self.final_layer = FinalLayer(hidden_size, patch_t * patch_h * patch_w * self.out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Initialise a model of a named size: `STDiT.from_preset("XL/2", variant="dit")`.

        Raises:
            SettingsError: unknown preset.
            TypeError: an override that is no constructor argument.
        """
        return cls(**{**preset(name), **overrides})

    @classmethod
    def arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return all constructor arguments, defaults included, of a preset or of a `model.config`.

        diffusers' private keys of a config, such as "_class_name", are left out.
        """
        parameters = inspect.signature(cls.__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
        return {**defaults, **{name: value for name, value in config.items() if not name.startswith("_")}}

    @classmethod
    def parameter_shapes(cls, **arguments: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name, buffers included, without allocating them.

        Raises:
            WeightsError: an argument that the constructor does not have.
        """
        unknown = sorted(arguments.keys() - inspect.signature(cls.__init__).parameters.keys())
        if unknown:
            raise WeightsError(f"STDiT has no argument {few(unknown)}: was this written by a newer version?")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        return dict(_parameter_shapes(cast(Any, cls), tuple(sorted(values.items()))))

    def initialize_weights(self) -> None:
        """Initialise as Open-Sora 1.0 does: the temporal and cross-attention projections and the output are zero."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(xavier)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        if patch.bias is not None:
            nn.init.zeros_(patch.bias)
        for path in (self.t_embedder.mlp, self.t_block, self.y_embedder.y_proj):
            for module in path.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)
            if hasattr(block, "attn_temp"):
                nn.init.zeros_(block.attn_temp.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def null_caption(self, batch: int, length: int) -> Tensor:
        """Return the caption that stands for "no text" in guidance and caption dropout.

        A sampler passes `null` to `encode_text` instead, which works with offloaded weights, too.

        Args:
            batch: B.
            length: L, at most `model_max_length`.

        Returns:
            [B, L, caption_channels].

        Raises:
            ValueError: `length` is above `model_max_length`.
        """
        return self.y_embedder.null(length).expand(batch, -1, -1)

    def encode_text(self, y: Tensor, mask: Tensor | None = None, null: Tensor | None = None) -> TextCache:
        """Return a caption to be passed as `y` at each sampling step, whose keys and values are computed once.

        They are by the first call that it is passed to, so that no weights are needed outside the model's forward:
        those of an offloaded model are elsewhere then.

        Args:
            y: text-encoder states [B, L, caption_channels].
            mask: [B, L], nonzero for tokens that are attended to; None for all.
            null: [B] bool, True for captions to be replaced by the null caption; None for none.
        """
        return TextCache(_without_singleton(y), None if mask is None else mask.bool(), null)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextCache,
        mask: Tensor | None = None,
        space_scale: float | None = None,
        time_scale: float | None = None,
        first_frame: int = 0,
        return_dict: bool = False,
    ) -> Tensor | Transformer2DModelOutput:
        """Predict the noise (iDDPM) or the velocity (rectified flow) of noisy latents.

        Args:
            x: noisy latents [B, C, T, H, W]; T, H and W are multiples of the patch.
            timestep: [B], 0..999 (iDDPM), or 1000 * sigma (rectified flow).
            y: text-encoder states [B, L, caption_channels], or the result of `encode_text`.
            mask: [B, L], nonzero for text tokens that are attended to; None for all. A `TextCache` has its own.
            space_scale, time_scale: position scales; those of the configuration by default.
            first_frame: index in its clip of the first frame of x, if x is part of a clip; a multiple of the patch.
            return_dict: return diffusers' output, with the prediction as `sample`.

        Returns:
            [B, 2C, T, H, W] (epsilon or velocity, then the variance channels), or [B, C, T, H, W] without learn_sigma.

        Raises:
            ValueError: an axis that is no multiple of the patch, another number of channels, or two masks.
        """
        if isinstance(y, TextCache) and mask is not None:
            raise ValueError("a TextCache has its own mask: pass the mask to encode_text")
        grid_t, grid_h, grid_w = self._token_grid(x)
        width, start = self.config.hidden_size, first_frame // self.config.patch_size[0]
        space_scale = self.config.space_scale if space_scale is None else space_scale
        time_scale = self.config.time_scale if time_scale is None else time_scale

        texts, mask_BL = self._block_texts(y, mask)
        h = self.x_embedder(x)  # [B, T, S, D]
        like: dict[str, Any] = {"device": h.device, "dtype": h.dtype}
        time_TD = temporal_positions(width, start + grid_t, time_scale, **like)[start:]
        h = h + spatial_positions(width, grid_h, grid_w, space_scale, **like)
        if self.config.variant == "dit":
            h = h + time_TD[:, None]
        t_BD = self.t_embedder(timestep)  # float32
        t0_B6D = rearrange(self.t_block(t_BD), "b (six d) -> b six d", six=6)

        for i, block in enumerate(self.blocks):
            if self.config.variant == "latte" and i == 1:
                h = h + time_TD[:, None]
            position_TD = time_TD if block.mixing in ("sequential", "parallel") and i == 0 else None
            inputs = (h, t0_B6D, texts[i], mask_BL, position_TD)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, *inputs)
            else:
                h = block(*inputs)  # [B, T, S, D]

        h = self.final_layer(h, t_BD)  # [B, T, S, patch volume * out channels]
        patch_t, patch_h, patch_w = self.config.patch_size
        sample = rearrange(
            h,
            "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            h=grid_h, pt=patch_t, ph=patch_h, pw=patch_w,
        )  # fmt: skip
        return Transformer2DModelOutput(sample) if return_dict else sample

    def enable_cache(self, config: Any) -> None:
        """Reuse parts of earlier steps, see `CacheMixin.enable_cache` of diffusers; `disable_cache` ends it.

        Args:
            config: diffusers' FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, FasterCacheConfig, MagCacheConfig
                or TaylorSeerCacheConfig. `stdit_model.sampling.caches` has some with this model's names of layers.

        Raises:
            SettingsError: another cache, which does not work with this model; or one of blocks, and there is one block.
        """
        name = type(config).__name__
        if name not in CACHES:
            raise SettingsError(f"{name} does not work with STDiT: choose {', '.join(CACHES)}")
        if name in ("FirstBlockCacheConfig", "MagCacheConfig"):
            if len(self.blocks) < 2:
                raise SettingsError(f"{name} skips blocks, and this model has one")
            TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))
        if name == "FasterCacheConfig":  # it halves this argument, and the tensors before it
            config = replace(config, _unconditional_conditional_input_kwargs_identifiers=["y"])
        super().enable_cache(config)

    def _block_texts(
        self, y: Tensor | TextCache, mask: Tensor | None
    ) -> tuple[Sequence[Tensor | BlockText], Tensor | None]:
        """What each block attends to, and the mask: the caption's states [B, L, D], or what a cache keeps of it."""
        if not isinstance(y, TextCache):
            states_BLD = self.y_embedder(_without_singleton(y))
            return [states_BLD] * len(self.blocks), None if mask is None else mask.bool()
        if not y.blocks:
            assert y.y_BLC is not None
            states_BLD = self.y_embedder(y.y_BLC, y.null_B)
            if torch.is_grad_enabled():  # a backward frees what would be kept
                return [states_BLD] * len(self.blocks), y.mask_BL
            y.blocks = [BlockText(states_BLD) for _ in self.blocks]
            y.y_BLC = None  # several times as wide as what the blocks keep
        return y.blocks, y.mask_BL

    def _token_grid(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of latents [B, C, T, H, W]."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"expected latents of shape [B, {self.config.in_channels}, T, H, W], not {list(x.shape)}")
        sizes = tuple(x.shape[2:])
        for axis, size, patch in zip(("frames T", "height H", "width W"), sizes, self.config.patch_size, strict=True):
            if size % patch:
                raise ValueError(f"{axis} of the latents is {size}, which is no multiple of the patch size {patch}")
        t, h, w = (size // patch for size, patch in zip(sizes, self.config.patch_size, strict=True))
        return t, h, w


def _without_singleton(y: Tensor) -> Tensor:
    """[B, L, Dc] of captions that may have the singleton axis of Open-Sora 1.0 and PixArt, [B, 1, L, Dc]."""
    return y.squeeze(1) if y.ndim == 4 else y


# A saved pipeline records the module of each of its classes: the public name must not change with the files.
STDiT.__module__ = "stdit_model"


@lru_cache(maxsize=32)
def _parameter_shapes(cls: Any, arguments: tuple[tuple[str, Any], ...]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cls(**dict(arguments)).state_dict().items()}
