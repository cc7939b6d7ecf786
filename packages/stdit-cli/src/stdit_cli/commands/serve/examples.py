"""Videos of the bundled demo model, as `stdit sample PROMPT --format webp` makes them, compressed with quality 90."""

from importlib import resources

EXAMPLES = (
    "a red circle moving left",
    "a green cross moving up",
    "a blue triangle moving right",
    "a yellow bar moving down",
    "a purple circle moving up right",
    "a cyan cross moving down left",
    "a white triangle staying still",
    "a red bar moving up left",
)


def example_files() -> list[str]:
    """Return the file of each example, an animated WebP of 16 frames of 64x64 pixels."""
    folder = resources.files("stdit_cli.commands.serve").joinpath("examples")
    return [str(folder.joinpath(f"{prompt.replace(' ', '-')}.webp")) for prompt in EXAMPLES]
