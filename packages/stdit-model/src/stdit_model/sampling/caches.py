"""Caches of diffusers by name: steps that reuse parts of earlier ones are faster, and less exact.

| name | reuses | value |
|---|---|---|
| first-block | all blocks but the first, while its output changes by less (arXiv:2411.19108) | relative change, 0.05 |
| pab | attention (Pyramid Attention Broadcast, arXiv:2408.12588) | one step of so many computes it, 2 |
| fastercache | the unconditional half, and then attention (arXiv:2410.19355) | one step of so many computes it, 5 |
| taylorseer | attention and MLP, extrapolated (arXiv:2503.06923) | one step of so many computes them, 3 |
"""

from collections.abc import Callable
from typing import Any

from stdit_model.errors import SettingsError

DEFAULTS: dict[str, float] = {"first-block": 0.05, "pab": 2.0, "fastercache": 5.0, "taylorseer": 3.0}
MOST_STEPS = 100  # of all but first-block


def parse_cache(cache: str) -> tuple[str, float]:
    """Parse the name of a cache and its value: "first-block" or "first-block:0.1".

    Raises:
        SettingsError: no such cache, or a value that makes no sense for it.
    """
    name, colon, text = cache.partition(":")
    if name not in DEFAULTS:
        raise SettingsError(f"cache {cache}: choose {', '.join(DEFAULTS)}, each with its value as in first-block:0.1")
    try:
        value = float(text) if colon else DEFAULTS[name]
    except ValueError:
        value = -1.0
    if name == "first-block" and not 0.0 < value <= 10.0:
        raise SettingsError(f"cache {cache}: expected a relative change above 0, as in first-block:0.1")
    if name != "first-block" and not (value.is_integer() and 2 <= value <= MOST_STEPS):
        raise SettingsError(f"cache {cache}: expected 2 to {MOST_STEPS} steps, as in {name}:2")
    return name, value


def cache_config(cache: str, current_timestep: Callable[[], float | None]) -> Any:
    """Return diffusers' configuration of a cache, for `STDiT.enable_cache`.

    Args:
        cache: see `parse_cache`.
        current_timestep: of the pipeline, 0 to 1000.

    Raises:
        SettingsError: no such cache.
    """
    import torch
    from diffusers import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    name, value = parse_cache(cache)
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=value)
    if name == "pab":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(value),
            temporal_attention_block_skip_range=int(value),
            cross_attention_block_skip_range=int(value),
            spatial_attention_block_identifiers=(r"\.attn$",),
            temporal_attention_block_identifiers=(r"\.attn_temp$",),
            cross_attention_block_identifiers=(r"\.cross_attn$",),
            current_timestep_callback=current_timestep,
        )
    if name == "fastercache":
        return FasterCacheConfig(
            unconditional_batch_skip_range=int(value),
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=current_timestep,
        )
    return TaylorSeerCacheConfig(
        cache_interval=int(value),
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.(attn|attn_temp|cross_attn|mlp)"],
    )
