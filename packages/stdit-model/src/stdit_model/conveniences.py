"""What callers of diffusers' pipelines expect around a call: VAE switches, state for callbacks, kinds of frames.

Legend: B videos, T frames, H W height and width.
"""

from typing import Any

from torch import Tensor


class Conveniences:
    """Of `STDiTPipeline`, whose VAE it switches and whose calls set the state."""

    vae: Any
    _guidance_scale: float
    _num_timesteps: int
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        """Of the call under way, for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way, all windows together."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback may set `pipeline._interrupt = True`: sampling ends after that step."""
        return self._interrupt

    def enable_vae_slicing(self) -> None:
        """Decode frame by frame, for less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode `decode_chunk_size` frames at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large frames tile by tile, for less memory; tiles are blended where they meet."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode frames whole again."""
        self.vae.disable_tiling()


def as_frames(output_type: str, video: Tensor) -> Any:
    """A decoded video [B, 3, T, H, W] in [-1, 1] as the caller wants it."""
    if output_type == "pt":
        return video
    array = (video / 2 + 0.5).permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype("uint8")]
