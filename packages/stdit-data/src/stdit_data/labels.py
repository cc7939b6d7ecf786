"""Draw text under pictures: wrapped to a width, in a font that has its characters."""

import logging
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, QUIET = (255, 255, 255), (32, 32, 32), (112, 112, 112)
SIZE, SMALL = 13, 11  # of the font, in pixels
MARGIN = 4  # pixels left and right of the text
MISSING = "\N{WHITE SQUARE}"  # drawn for a character that no font has

log = logging.getLogger(__name__)


def draw_label(text: str, width: int, details: str = "") -> Image.Image:
    """Draw a text, dark on white, with details below it in smaller grey letters.

    DejaVu Sans is used, or else the first installed font that has all characters of the text. Where none has, the
    missing ones are drawn as squares; `missing_characters` tells which they are.

    Args:
        text: wrapped to the width; a word that is wider is broken, after a hyphen where it has one.
        width: of the picture, in pixels.
        details: wrapped likewise.

    Returns:
        An RGB image as high as its lines.
    """
    lines = []
    for part, size, colour in ((text, SIZE, INK), (details, SMALL, QUIET)):
        part = unicodedata.normalize("NFC", part)
        font = ImageFont.truetype(_font_file(part) or _dejavu(), size)
        lost = missing_characters(part)
        part = "".join(MISSING if letter in lost else letter for letter in part)
        lines += [(line, font, size + 3, colour) for line in _wrapped(part, font, width - 2 * MARGIN)] if part else []
    label = Image.new("RGB", (width, sum(pitch for _, _, pitch, _ in lines) + MARGIN), PAPER)
    draw, y = ImageDraw.Draw(label), MARGIN // 2
    for line, font, pitch, colour in lines:
        draw.text((MARGIN, y), line, fill=colour, font=font)
        y += pitch
    return label


def missing_characters(text: str) -> str:
    """Return the characters of a text that are drawn as squares, each once; "" if a font has them all."""
    text = unicodedata.normalize("NFC", text)
    return "" if _font_file(text) else "".join(dict.fromkeys(c for c in text if ord(c) not in _characters(_dejavu())))


def warn_of_missing(texts: Iterable[str]) -> None:
    """Log a warning that names the characters of texts which are drawn as squares, if there are any."""
    lost = "".join(dict.fromkeys("".join(map(missing_characters, texts))))
    if lost:
        named = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in lost[:5])
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        log.warning(
            "no installed font has %s%s: drawn as %s; install one that has them, for instance Noto Sans CJK",
            named,
            more,
            MISSING,
        )


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            end = len(word)
            while end > 1 and font.getlength(word[:end]) > width:
                end -= 1
            end = word.rfind("-", 0, end) + 1 or end
            lines += [line] if line else []
            lines.append(word[:end])
            line, word = "", word[end:]
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


@cache
def _font_file(text: str) -> str | None:
    """Find a font that has all characters of a text."""
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    if wanted <= _characters(_dejavu()):
        return _dejavu()
    return next((file for file in _installed_fonts() if wanted <= _characters(file)), None)


@cache
def _dejavu() -> str:
    """The font that comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _installed_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    return sorted(findSystemFonts())


@cache
def _characters(file: str) -> frozenset[int]:
    """The code points that a font has glyphs for; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
