"""How much a request may ask for. No heavy imports."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for; None for the class's own value, or the checkpoint's own if that is more.

    Attributes:
        frames: of a video.
        size: pixels of a side.
        steps: denoising steps.
        prompt: characters of a prompt, and of a negative one.
        waiting: requests that wait for their turn.
    """

    frames: int | None = 64
    size: int | None = 512
    steps: int | None = 100
    prompt: int = 1000
    waiting: int = 16

    def over(self, own: "Own") -> "Limits":
        """Return the limits for a checkpoint, none of them None."""
        return replace(
            self,
            frames=self.frames or max(Limits.frames or 0, own.frames),
            size=self.size or max(Limits.size or 0, own.height, own.width),
            steps=self.steps or max(Limits.steps or 0, own.steps),
        )


@dataclass(frozen=True)
class Own:
    """What a checkpoint makes if it is not told otherwise, and the page begins with."""

    frames: int
    height: int
    width: int
    steps: int
    guidance: float
