"""STDiT, the spatial-temporal diffusion transformer of Open-Sora 1.0, and its three relatives.

Legend: B batch, C channels, T frames, H W height and width, S tokens per frame, L text tokens, D width, N heads,
K head width. Sizes in latents unless said otherwise.
"""

from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
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
from stdit_model.layers import FinalLayer
from stdit_model.presets import Variant, preset
from stdit_model.weights import load as weights


class TextCache(NamedTuple):
    """A caption as the blocks read it: made by `STDiT.encode_text`, the same for every sampling step."""

    keys_values: list[tuple[Tensor, Tensor]]  # one pair a block, each [B, N, L, K]
    mask_BL: Tensor | None  # True where a token takes part


class STDiT(ModelMixin, ConfigMixin):
    """A video diffusion transformer over latents.

    Args:
        variant: how tokens mix: "seq" (STDiT of Open-Sora 1.0), "parallel", "dit" (full attention) or "latte".
        depth: number of blocks (for latte both kinds count).
        hidden_size: width D; a multiple of 4 (the 2-D sin-cos positions) and of `num_heads`.
        num_heads: attention heads.
        patch_size: frames, rows and columns of a patch; (1, 2, 2) as published, (2, 2, 2) for the 3-D patch embedder.
        in_channels: latent channels C.
        learn_sigma: predict 2C channels, the second half the interpolated log variance (iDDPM); else C.
        mlp_ratio: hidden width of the MLP over D.
        caption_channels: width of the text encoder's states (4096 for T5-XXL).
        model_max_length: text tokens of the null caption (120).
        space_scale, time_scale: default position scales: positions are index / scale.

    The latte variant follows the report's description of Latte. It is diffusers' LatteTransformer3DModel but for
    this: our temporal blocks have cross-attention too (without it the two are equal); `depth` counts both kinds of
    block, theirs makes two for each of `num_layers`; theirs has temporal positions for exactly `video_length` frames,
    unscaled, and none for a single frame; and theirs stretches spatial positions to its native `sample_size`, where
    ours are index / space_scale.

    Sources: Open-Sora 1.0 report (STDiT); DiT, arXiv:2212.09748; PixArt-alpha, arXiv:2310.00426; Latte,
    arXiv:2401.03048.
    """

    blocks: MutableSequence[Block]  # an nn.ModuleList, typed by what it holds
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers reads these from the class)
    _repeated_blocks = ["Block"]  # noqa: RUF012

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
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4, as 2-D sin-cos positions need")
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
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "STDiT":
        """A freshly initialised model of a named size: `STDiT.from_preset("XL/2", variant="dit")`.

        Raises:
            ValueError: unknown preset.
            TypeError: an override that the constructor does not know.
        """
        return cls(**{**preset(name), **overrides})

    @classmethod
    def from_open_sora(
        cls,
        path_or_hub_id: str | Path,
        num_heads: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> "STDiT":
        """The weights of an Open-Sora v1.0 release: `STDiT.from_open_sora("OpenSora-v1-HQ-16x512x512.pth")`.

        Every size and the variant are read from the tensors, the position scales from its position buffers where it
        has them. The file is a torch archive (its tensors at the top level, or under `ema`) or the same tensors as
        safetensors; it may be on the Hub, as "hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth".

        Args:
            num_heads: width / 72 unless given; it doesn't show in the tensors.
            dtype: of the parameters.
            overrides: constructor arguments; position scales replace the file's, and variant="parallel" may read
                a "seq" file, whose tensors are the same; others must agree with it.

        Raises:
            FileNotFoundError: nothing is there.
            WeightsError: another layout, or a key missing, left over, of another shape or in conflict with an override.
        """
        return weights.build(cls, weights.open_sora_weights(path_or_hub_id, num_heads, **overrides), dtype)

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
    ) -> "STDiT":
        """A video model that starts from PixArt-alpha's image model.

        For "seq" (the default) and "parallel" the new temporal attention starts with a zero projection, so that
        the output on T frames equals PixArt on each. "dit" takes every weight, "latte" all but its odd blocks'
        self-attention, and neither has this property.

        Args:
            path_or_hub_id: the original .pth, or a folder (or Hub id) in diffusers' layout.
            num_heads: the config.json's, or else width / 72, unless given.
            ema: read `state_dict_ema` of a .pth instead of `state_dict`.
            null_caption: [L, caption_channels], the text encoder's states of the empty prompt. diffusers' layout has
                none: without this argument it then keeps a random start, with a warning. It replaces a .pth's own.
            dtype: of the parameters.
            overrides: constructor arguments, such as `variant` and the position scales; sizes must agree with the file.

        Raises:
            FileNotFoundError: nothing is there.
            WeightsError: another layout, or a key missing, left over, of another shape or in conflict with an override.
        """
        found = weights.pixart_weights(path_or_hub_id, num_heads, ema=ema, null_caption=null_caption, **overrides)
        return weights.build(cls, found, dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "STDiT":
        """A model that `save_pretrained` or `push_to_hub` wrote, as diffusers reads it, but strictly.

        Args:
            pretrained_model_name_or_path: its folder, or a Hub id.
            options: of diffusers' `ModelMixin.from_pretrained`, such as dtype, subfolder, revision, device_map.

        Raises:
            FileNotFoundError: no such folder, or no config.json or weights in it.
            WeightsError: tensors missing, left over or of other shapes; or the Hub doesn't give the model.
        """
        folder, options = weights.checked_folder(pretrained_model_name_or_path, options)
        return super().from_pretrained(folder, **options)

    def initialize_weights(self) -> None:
        """Initialise as Open-Sora 1.0 does: the new temporal attention and the output start at zero."""

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
        """The caption that stands for "no text", [B, length, caption_channels], for guidance and caption dropout."""
        null_LC = self.y_embedder.y_embedding
        if length > len(null_LC):
            raise ValueError(f"a null caption of {length} tokens: this model has {len(null_LC)} (model_max_length)")
        return null_LC[:length].expand(batch, -1, -1)

    def encode_text(self, y: Tensor, mask: Tensor | None = None) -> TextCache:
        """Every block's text keys and values, computed once: pass the result as `y` at each sampling step.

        Args:
            y: text-encoder states [B, L, caption_channels].
            mask: [B, L], nonzero where a token takes part; None for all.
        """
        if y.ndim == 4:  # Open-Sora 1.0 and PixArt keep a singleton axis: [B, 1, L, Dc]
            y = y.squeeze(1)
        text_BLD = self.y_embedder(y)
        return TextCache(
            [block.cross_attn.keys_values(text_BLD) for block in self.blocks], None if mask is None else mask.bool()
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextCache,
        mask: Tensor | None = None,
        space_scale: float | None = None,
        time_scale: float | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """
        Args:
            x: noisy latents [B, C, T, H, W]; T, H, W are multiples of the patch.
            timestep: [B], 0..999 (iDDPM), or 1000 * sigma (rectified flow).
            y: text-encoder states [B, L, caption_channels], or what `encode_text` made of them.
            mask: [B, L], nonzero where a text token takes part; None for all. A `TextCache` has its own.
            space_scale, time_scale: position scales; the configuration's unless given.
            first_frame: where x starts in its clip, in latent frames, if x is a part of one; a multiple of the patch.

        Returns:
            [B, 2C, T, H, W] (epsilon or velocity, then the variance channels), or [B, C, T, H, W] without learn_sigma.

        Raises:
            ValueError: an axis that the patch does not divide, the wrong number of channels, or two masks.
        """
        grid_t, grid_h, grid_w = self._token_grid(x)
        if isinstance(y, TextCache) and mask is not None:
            raise ValueError("a TextCache has its own mask: give the mask to encode_text")
        width = self.config.hidden_size
        space_scale = self.config.space_scale if space_scale is None else space_scale
        time_scale = self.config.time_scale if time_scale is None else time_scale
        space_SD = spatial_positions(width, grid_h, grid_w, space_scale).to(x.device)
        start = first_frame // self.config.patch_size[0]
        time_TD = temporal_positions(width, start + grid_t, time_scale)[start:].to(x.device)
        text = y if isinstance(y, TextCache) else self.encode_text(y, mask)

        h = self.x_embedder(x)  # [B, T, S, D]
        h = h + space_SD.to(h.dtype)
        if self.config.variant == "dit":
            h = h + time_TD[:, None].to(h.dtype)
        t_BD = self.t_embedder(timestep)  # float32
        t0_B6D = rearrange(self.t_block(t_BD), "b (six d) -> b six d", six=6)

        for i, block in enumerate(self.blocks):
            if self.config.variant == "latte" and i == 1:
                h = h + time_TD[:, None].to(h.dtype)
            position = time_TD if block.mixing in ("sequential", "parallel") and i == 0 else None
            h = block(h, t0_B6D, text.keys_values[i], text.mask_BL, position)

        h = self.final_layer(h, t_BD)
        patch_t, patch_h, patch_w = self.config.patch_size
        return rearrange(
            h,
            "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            h=grid_h, pt=patch_t, ph=patch_h, pw=patch_w,
        )  # fmt: skip

    def _token_grid(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"latents of shape [B, {self.config.in_channels}, T, H, W] expected, not {list(x.shape)}")
        sizes = tuple(x.shape[2:])
        for axis, size, patch in zip(("frames T", "height H", "width W"), sizes, self.config.patch_size, strict=True):
            if size % patch:
                raise ValueError(f"{axis} of the latents is {size}, which the patch size {patch} does not divide")
        t, h, w = (size // patch for size, patch in zip(sizes, self.config.patch_size, strict=True))
        return t, h, w


# A saved pipeline records the module of each of its classes: the public name must not change with the files.
STDiT.__module__ = "stdit_model"
