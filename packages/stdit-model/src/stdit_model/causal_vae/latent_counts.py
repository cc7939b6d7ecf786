"""How many latents cover the frames of a clip; without torch, for what is checked before it is loaded."""


def covering_latents(frames: int, stride: int, unit: int = 1) -> int:
    """Return the number of latents that cover frames, of which the first has one latent of its own.

    Args:
        frames: of the clip.
        stride: frames per latent after the first.
        unit: latents that are made together.
    """
    return -(-(frames - 1) // (unit * stride)) * unit + 1


def latents_at_once(class_name: str) -> int:
    """Return the number of latents that a VAE of a class makes together: two in CogVideoX, one in the others."""
    # CogVideoX decodes an odd number of latents as other VAEs do, but an even one to four frames of each.
    return 2 if class_name == "AutoencoderKLCogVideoX" else 1
