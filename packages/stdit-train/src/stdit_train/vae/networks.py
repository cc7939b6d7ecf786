"""The networks of a VAE's run: the VAE, by option a discriminator, and where their weights come from."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stdit_model import CausalVideoVAE
from stdit_model.errors import WeightsError
from stdit_train.components.load import load_vae
from stdit_train.config.schema import TrainConfig, VaeConfig
from stdit_train.errors import ConfigError
from stdit_train.vae.patch_discriminator import PatchDiscriminator

RECOMPUTED = 8  # tensors of a block's input size that its recomputation keeps at a time
_SETTINGS = {  # of a VAE's config, with the run's settings that they follow from
    "latent_channels": "vae.latent_channels",
    "block_out_channels": "vae.channels",
    "layers_per_block": "vae.layers",
    "norm_num_groups": "vae.groups",
    "mid_block_add_attention": "vae.attention",
    "temporal_compression_ratio": "vae.temporal",
    "levels": "vae.bottleneck and vae.levels",
}


class Networks(nn.Module):
    """All that is trained: `vae`, and `discriminator`, None without one."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.vae: Any = build_vae(config)
        self.discriminator = build_discriminator(config)


def build_discriminator(config: VaeConfig) -> PatchDiscriminator | None:
    """Build an untrained discriminator of frames or clips; None for a run without one."""
    if config.discriminator == "none":
        return None
    over_time = config.discriminator == "3d"
    return PatchDiscriminator(config.discriminator_channels, config.discriminator_layers, over_time=over_time)


def build_vae(config: VaeConfig) -> Any:
    """Build an untrained VAE: diffusers' AutoencoderKL, or a `CausalVideoVAE`."""
    sizes: dict[str, Any] = {
        "latent_channels": config.latent_channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.attention,
    }
    if config.kind == "video":
        codes = config.levels if config.bottleneck == "fsq" else None
        return CausalVideoVAE(**sizes, temporal_compression_ratio=config.temporal, levels=codes)
    levels = len(config.channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**sizes, **blocks)


def build_networks(config: TrainConfig, device: torch.device) -> tuple[Networks, str | None]:
    """Build the networks of a run, initialised from its seed or from `init`; also returns a line about the latter.

    Raises:
        ConfigError: the weights to start from cannot be loaded, or are of a VAE of another kind or size.
    """
    torch.manual_seed(config.seed)
    networks = Networks(config.vae)
    about = None if config.init is None else load_initial_vae(networks.vae, config.init)
    return networks.to(device), about


def load_initial_vae(vae: Any, source: str) -> str:
    """Load weights into a VAE and return a line that describes them.

    Args:
        vae: filled in place.
        source: folder, run folder, Hub id or "demo", of a VAE of the same kind and sizes; for a video VAE also of an
            image VAE, whose weights all have a place.

    Raises:
        ConfigError: it cannot be loaded, or has another kind or size; the message names the first that differs.
    """
    found = load_vae(source, torch.device("cpu"), "--init")
    inflated = isinstance(vae, CausalVideoVAE) and isinstance(found, AutoencoderKL)
    if type(found) is not type(vae) and not inflated:
        raise ConfigError(
            f"{source} is a {type(found).__name__}, this run trains a {type(vae).__name__}: start from one, or leave "
            "--init out"
        )
    for name, key in _SETTINGS.items():
        theirs, ours = (tuple(v) if isinstance(v, list) else v for v in (found.config.get(name), vae.config.get(name)))
        if theirs != ours and not (inflated and name in ("temporal_compression_ratio", "levels")):
            raise ConfigError(f"{source} has {name} {theirs}, this run {ours}: set {key} to match")
    try:
        if inflated:
            vae.load_image_vae(found)
            return f"starting from {source}: an image VAE; what looks back in time starts at zero"
        vae.load_state_dict(found.state_dict())
    except (RuntimeError, WeightsError) as error:
        raise ConfigError(f"{source} does not fit this run's VAE: {str(error).splitlines()[-1].strip()}") from error
    return f"starting from {source}: a {type(found).__name__}"


def reconstruct(vae: Any, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Encode and decode clips.

    Args:
        vae: image or video VAE.
        video: [B, 3, T, H, W] in [-1, 1]; an image VAE takes each frame by itself.
        noise: [B, C, T', h, w], normal: sample of the posterior. [default: its mean]

    Returns:
        The reconstruction [B, 3, T, H, W], and mean and log variance of the posterior [B, C, T', h, w], in float32.
    """
    image, b = isinstance(vae, AutoencoderKL), len(video)
    frames = video.transpose(1, 2).flatten(0, 1) if image else video
    moments = vae.encode(frames).latent_dist.parameters.float()
    if image:
        moments = moments.unflatten(0, (b, -1)).transpose(1, 2)
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
    again = vae.decode(z.transpose(1, 2).flatten(0, 1) if image else z).sample.float()
    return again.unflatten(0, (b, -1)).transpose(1, 2) if image else again, mean, log_variance


def latent_size(config: VaeConfig, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return channels, frames, height and width of the latents of a clip."""
    latents = 1 + (frames - 1) // config.temporal if config.kind == "video" else frames
    return config.latent_channels, latents, height // config.stride, width // config.stride


class ForwardNeeds(NamedTuple):
    """What a forward of a network in float32 takes: FLOPs, and bytes that are kept for the backward."""

    parameters: int
    flops: int
    activations: int
    largest: int  # of the tensors that are kept


@cache
def forward_needs(
    config: VaeConfig, clips: int, frames: int, height: int, width: int, checkpointing: bool = False
) -> ForwardNeeds:
    """Measure what a forward of a run's VAE takes, on the meta device: nothing is allocated or computed.

    The discriminator and the features of the perceptual term are not counted; see `discriminator_needs`.
    """
    with torch.device("meta"):
        vae = build_vae(config)
        if checkpointing:
            recompute(vae)
        needs = _measure(vae, lambda: reconstruct(vae, torch.empty(clips, 3, frames, height, width)))
    block = RECOMPUTED * needs.largest if checkpointing else 0
    return ForwardNeeds(needs.parameters, needs.flops, needs.activations + block, needs.largest)


@cache
def discriminator_needs(config: VaeConfig, clips: int, frames: int, height: int, width: int) -> ForwardNeeds:
    """Measure what a forward of a run's discriminator takes, on the meta device; nothing without one."""
    with torch.device("meta"):
        discriminator = build_discriminator(config)
        if discriminator is None:
            return ForwardNeeds(0, 0, 0, 0)
        return _measure(discriminator, lambda: discriminator(torch.empty(clips, 3, frames, height, width)))


def _measure(network: nn.Module, run: Callable[[], Any]) -> ForwardNeeds:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        storages.append(tensor)  # alive, so that no other storage takes its place in the count
        return tensor

    storages: list[Tensor] = []
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        run()
    sizes = [size for storage, size in kept.items() if storage not in weights]
    count = sum(p.numel() for p in network.parameters())
    return ForwardNeeds(count, counter.get_total_flops(), sum(sizes), max(sizes))


def recompute(vae: Any) -> None:
    """Recompute the blocks of a VAE in the backward instead of keeping their activations."""
    vae.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
