"""The losses of a VAE: L1, KL divergence, by option a perceptual term and a discriminator.

As in latent diffusion (Rombach et al. 2022, appendix G), which follows VQGAN (Esser et al. 2021, eq. 6 and 7):

    loss = |x - x'| + w_p perceptual(x, x') + kl KL / values + lambda w_d generator + discriminator

Means over the values of the frames, so that `kl` is what theirs is for sums. The last two terms count from a step on;
lambda is the ratio of the gradients of the first two and of the generator's at the decoder's last layer. Codes (FSQ)
have no divergence.

B batch, C channels, T frames, H W height and width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stdit_train.config.schema import VaeConfig
from stdit_train.errors import ConfigError
from stdit_train.vae.networks import Networks, reconstruct
from stdit_train.vae.patch_discriminator import hinge

DELTA, MOST = 1e-4, 1e4  # of the adaptive weight, as in VQGAN's code


def load_features(path: str, device: torch.device) -> nn.Module:
    """Load the feature network of the perceptual term.

    Args:
        path: TorchScript file of a module that maps frames [N, 3, H, W] in [-1, 1] to one feature map [N, C, h, w] or
            several.
        device: where it is put.

    Raises:
        ConfigError: no such file, or not TorchScript.
    """
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"vae.perceptual {path}: there is no such file; give a TorchScript file (torch.jit.save)")
    try:
        module: nn.Module = torch.jit.load(str(Path(path).expanduser()), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"vae.perceptual {path}: not a TorchScript file: save it with torch.jit.save") from error
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module.eval()


def perceptual_distance(features: nn.Module, x: Tensor, again: Tensor) -> Tensor:
    """Return the distance [B] of clips [B, 3, T, H, W] in features of their frames (LPIPS; Zhang et al. 2018, eq. 1).

    Each feature vector is scaled to length 1; the squared distances are averaged over positions and frames and summed
    over the feature maps, without the weights that LPIPS has learned: a feature network may apply them itself.
    """
    pairs = zip(_maps(features, x), _maps(features, again), strict=True)
    distances = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs]
    return torch.stack(distances).sum(0).unflatten(0, (len(x), -1)).mean(1)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the divergence [B] of posteriors from the standard normal distribution, summed over their values."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)


def adaptive_weight(base: Tensor, generator: Tensor, layer: Tensor) -> Tensor:
    """Return the ratio of the gradients of two scalar losses at a layer (VQGAN, eq. 7), without a gradient."""
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].float().norm() for loss in (base, generator)]
    return (norms[0] / (norms[1] + DELTA)).clamp(0.0, MOST).detach()


def vae_loss(
    networks: Networks, config: VaeConfig, x: Tensor, noise: Tensor, step: int, features: nn.Module | None = None
) -> dict[str, Tensor]:
    """Compute the loss terms of a micro-batch, each [B]: "loss" is what is minimised, by both networks at once.

    The discriminator's weights get no gradient from the generator's term, and the VAE's none from the discriminator's.

    Args:
        networks: VAE and discriminator.
        config: weights of the terms.
        x: clips [B, 3, T, H, W] in [-1, 1].
        noise: [B, C, T', h, w], normal: sample of the posterior.
        step: optimizer steps done.
        features: see `perceptual_distance`; None for no such term.
    """
    again, mean, log_variance = reconstruct(networks.vae, x, noise)
    terms = {"l1": (x - again).abs().flatten(1).mean(1)}
    base = terms["l1"]
    if features is not None:
        terms["perceptual"] = perceptual_distance(features, x, again)
        base = base + config.perceptual_weight * terms["perceptual"]
    loss = base
    if config.bottleneck == "kl":
        terms["kl"] = kl_divergence(mean, log_variance)
        loss = base + config.kl * terms["kl"] / x[0].numel()
    discriminator = networks.discriminator
    if discriminator is not None and step >= config.discriminator_start:
        frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        terms["generator"] = -functional_call(discriminator, frozen, (again,)).float().flatten(1).mean(1)
        layer = networks.vae.decoder.conv_out.weight
        weight = adaptive_weight(base.mean(), terms["generator"].mean(), layer)
        terms["adaptive_weight"] = weight.expand(len(x))
        terms["discriminator"] = hinge(discriminator(x), discriminator(again.detach()))
        loss = loss + config.discriminator_weight * weight * terms["generator"] + terms["discriminator"]
    return {"loss": loss, **terms}


def _maps(features: nn.Module, video: Tensor) -> list[Tensor]:
    found: Any = features(video.transpose(1, 2).flatten(0, 1))
    return [each.float() for each in ([found] if isinstance(found, Tensor) else found)]
