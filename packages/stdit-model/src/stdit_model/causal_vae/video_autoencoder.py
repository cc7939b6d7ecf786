"""A causal video VAE that an image VAE (AutoencoderKL, such as sd-vae-ft) can be taken over into without loss.

diffusers' own video VAEs cannot take one over exactly: AutoencoderKLWan has another norm (RMS), AutoencoderKLCogVideoX
and AutoencoderKLHunyuanVideo normalise over time, so that a frame changes with those after it, and AutoencoderKLMagvit
has no attention in its middle block. Here every layer of AutoencoderKL has its place, under its own name. What is new
is time alone: convolutions see two frames back, and some of the strided ones halve the frame rate.

- Nothing looks ahead. T = 1 + r k frames become 1 + k latents, r the temporal compression; the first frame is a latent
  of its own, so that a single image is a clip of one frame.
- Norms and attention see one frame at a time, so that chunks of a clip give what the whole gives.
- The kernel of an image becomes the last tap of a kernel over time, the other taps start at zero (inflation as in
  Carreira & Zisserman 2017, causal as in Yu et al. 2023, MAGVIT-v2). The layer that doubles the frame rate computes two
  frames from each latent by kernels of their own (depth to time), and drops the one before the first.

B batch, C channels, T frames, H W height and width; r temporal compression.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit_model.causal_vae.codec import Decoder, Encoder, Past
from stdit_model.causal_vae.latent_scale import normalisation
from stdit_model.causal_vae.quantization import CODE_DEVIATION, NO_VARIANCE, nearest_codes, quantize
from stdit_model.errors import SettingsError, WeightsError, few

SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class CausalVideoVAE(ModelMixin, ConfigMixin):
    """A video VAE with the interface of diffusers' video VAEs.

    Args:
        in_channels, out_channels: of the frames.
        latent_channels: channels C of the latents.
        block_out_channels: width at each size, from the largest; each but the first halves height and width.
        layers_per_block: blocks at each size of the encoder; the decoder has one more.
        norm_num_groups: groups of the norms.
        mid_block_add_attention: whether the middle blocks have attention.
        temporal_compression_ratio: r, a power of two; the frame rate is halved at the smallest sizes.
        levels: number of values of each latent channel, which makes the latents discrete (see `quantization`): the
            posterior has no variance, and `decode` takes every latent to its nearest code.
        scaling_factor, shift_factor, latents_mean, latents_std: normalise the latents, see `stdit_model.video_vae`.

    Raises:
        SettingsError: there are not enough sizes for the temporal compression, or not as many levels as channels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        temporal_compression_ratio: int = 4,
        levels: tuple[int, ...] | None = None,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        ratio, widths = temporal_compression_ratio, tuple(block_out_channels)
        halvings = ratio.bit_length() - 1
        if ratio < 1 or ratio & (ratio - 1) or halvings >= len(widths):
            most = 2 ** (len(widths) - 1)
            raise SettingsError(
                f"temporal_compression_ratio {ratio}: expected a power of two up to {most}, as there are {len(widths)} "
                "block_out_channels"
            )
        if levels is not None and (len(levels) != latent_channels or min(levels) < 2):
            raise SettingsError(
                f"levels {list(levels)}: expected {latent_channels}, one for each channel, of 2 or more"
            )
        parts = layers_per_block, norm_num_groups, mid_block_add_attention, halvings
        self.encoder = Encoder(in_channels, 2 * latent_channels, widths, *parts)
        self.decoder = Decoder(latent_channels, out_channels, widths, *parts)
        self.quant_conv = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1)
        self.latents_at_once: int | None = None

    @classmethod
    def from_image_vae(
        cls, image: Any, temporal_compression_ratio: int = 4, levels: tuple[int, ...] | None = None
    ) -> Self:
        """Build a video VAE with all weights of an AutoencoderKL, see `load_image_vae`.

        Raises:
            SettingsError: see `CausalVideoVAE`.
            WeightsError: the image VAE has layers that have no place here, or lacks some.
        """
        config = image.config
        names = [
            "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
            "norm_num_groups", "mid_block_add_attention", *SCALE_KEYS,
        ]  # fmt: skip
        sizes = {name: config[name] for name in names if config.get(name) is not None}
        video = cls(**sizes, temporal_compression_ratio=temporal_compression_ratio, levels=levels)
        video.load_image_vae(image)
        return video

    @torch.no_grad()
    def load_image_vae(self, image: Any) -> None:
        """Copy all weights of an AutoencoderKL of the same sizes.

        Before any training this encodes and decodes the first frame of a clip, and a single image, as that does.
        Latents that are rounded to codes, in [-1, 1], are normalised by the image VAE's statistics, to a deviation of
        `CODE_DEVIATION`, and taken back before they are decoded.

        Raises:
            WeightsError: a weight is missing, has no place here, or has another shape.
        """
        self._load_image_weights(image.state_dict())
        if self.config.levels is not None:
            self._normalise_latents(*normalisation(image, self.quant_conv.weight))

    def _normalise_latents(self, shift: Tensor, scale: Tensor) -> None:
        """Encode to (z - shift) * scale in place of z, to `CODE_DEVIATION`; both broadcast to [1, C, 1, 1, 1]."""
        c = self.config.latent_channels
        scale = CODE_DEVIATION * scale.expand(1, c, 1, 1, 1)
        shift = shift.expand(1, c, 1, 1, 1)
        encoding, decoding = self.quant_conv.state_dict(), self.post_quant_conv.state_dict()  # no padding is shifted
        encoding["weight"][:c] *= scale.transpose(0, 1)
        encoding["bias"][:c] = (encoding["bias"][:c] - shift.flatten()) * scale.flatten()
        decoding["bias"] += decoding["weight"].flatten(1) @ shift.flatten()
        decoding["weight"] /= scale
        self.register_to_config(
            scaling_factor=1 / CODE_DEVIATION, shift_factor=None, latents_mean=None, latents_std=None
        )

    def _load_image_weights(self, weights: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if missing := sorted(own.keys() ^ weights.keys()):
            raise WeightsError(f"not an AutoencoderKL that a video VAE of these sizes can start from: {few(missing)}")
        for name, target in own.items():
            source = weights[name]
            if target.ndim == 5 and source.ndim == 4:
                source = torch.cat([source] * max(1, len(target) // max(len(source), 1)))
                target.zero_()
                target = target[:, :, -1]  # the frame itself
            elif target.ndim == 1 and len(target) == 2 * len(source):  # the bias of a layer that doubles the frames
                source = torch.cat([source, source])
            if target.shape != source.shape:
                raise WeightsError(f"{name} is {tuple(source.shape)} in the image VAE, {tuple(target.shape)} expected")
            target.copy_(source)

    def enable_chunks(self, latent_frames: int | None = 2) -> None:
        """Encode and decode so many latent frames at once, which needs less memory and gives the same.

        Args:
            latent_frames: None for whole clips, the default of a new model.
        """
        self.latents_at_once = latent_frames

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode clips [B, 3, 1 + r k, H, W] in [-1, 1]; the posterior [B, C, 1 + k, h, w] is in `latent_dist`.

        Raises:
            SettingsError: another number of frames.
        """
        ratio = self.config.temporal_compression_ratio
        check_frames(x.shape[2], ratio)
        past: Past | None = None if self.latents_at_once is None else {}
        parts = [self.encoder(part, past) for part in _chunks(x, self.latents_at_once, ratio)]
        moments = self.quant_conv(torch.cat(parts, dim=2))
        if self.config.levels is not None:  # of the means alone: an image VAE's weights all have their place
            codes = quantize(moments.chunk(2, dim=1)[0], self.config.levels)
            moments = torch.cat([codes, torch.full_like(codes, NO_VARIANCE)], dim=1)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents [B, C, 1 + k, h, w]; the clips [B, 3, 1 + r k, H, W] are in `sample`."""
        past: Past | None = None if self.latents_at_once is None else {}
        if self.config.levels is not None:
            z = nearest_codes(z, self.config.levels).to(z.dtype)
        z = self.post_quant_conv(z)
        sample = torch.cat([self.decoder(part, past) for part in _chunks(z, self.latents_at_once, 1)], dim=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, x: Tensor) -> Any:
        """Encode clips to the mean of the posterior and decode it, as `decode` does."""
        return self.decode(self.encode(x).latent_dist.mode())


def check_frames(frames: int, ratio: int) -> None:
    """Check that a causal video VAE can take so many frames.

    Raises:
        SettingsError: it takes 1 and multiples of its temporal compression more; the message has the nearest.
    """
    if (frames - 1) % ratio or frames < 1:
        low = max(0, frames - 1) // ratio * ratio + 1
        raise SettingsError(
            f"{frames} frames: the video VAE takes 1 + a multiple of {ratio}, the nearest are {low} and {low + ratio}"
        )


def _chunks(x: Tensor, latents: int | None, ratio: int) -> Iterator[Tensor]:
    """Split frames [B, C, T, H, W] into chunks of so many latents: 1 + r (n - 1) frames first, then r n each."""
    if latents is None:
        yield x
        return
    start = 0
    while start < x.shape[2]:
        end = 1 + ratio * (latents - 1) if start == 0 else start + ratio * latents
        yield x[:, :, start:end]
        start = end


def vae_class(name: str) -> Any:
    """Return the class of a VAE's configuration (`_class_name`): this module's or diffusers'; else AutoencoderKL."""
    import diffusers

    return CausalVideoVAE if name == CausalVideoVAE.__name__ else getattr(diffusers, name, diffusers.AutoencoderKL)


CausalVideoVAE.__module__ = "stdit_model"  # where a pipeline's index says that it is
