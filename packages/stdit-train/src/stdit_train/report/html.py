"""Build self-contained HTML pages: style, tables, and files as data URLs."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

SHOWN = 192  # pixels that a small video is enlarged to at least, by a whole factor
WIDEST = 384  # pixels of a large one

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ccc; --marked: #fff4d6; --quiet: #555 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #1b1b1b; --line: #555; --marked: #4a3f1c; --quiet: #aaa }
  img { filter: invert(.9) hue-rotate(180deg) }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
body { color: var(--text); background: var(--page) }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere } code { overflow-wrap: anywhere }
img { max-width: 100% } pre { overflow-x: auto; padding: .6em; border: 1px solid var(--line) }
.table { overflow-x: auto; margin: 1em 0 } table { border-collapse: collapse }
td, th { border: 1px solid var(--line); padding: .2em .6em; text-align: left; vertical-align: top }
tr.differs td { background: var(--marked) } summary { cursor: pointer }
figure { display: inline-block; margin: .3em .6em .3em 0; vertical-align: top; max-width: 100%; font-size: 12px }
video { display: block; width: 100%; background: #8884; cursor: pointer } video.small { image-rendering: pixelated }
figcaption { color: var(--quiet); overflow-wrap: anywhere }
"""
_SCRIPT = """
const all = action => document.querySelectorAll("video").forEach(action);
const toggle = video => video.paused ? video.play() : video.pause();
document.addEventListener("click", event => event.target.matches("video") && toggle(event.target));
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && event.target.matches("video")) toggle(event.target);
});
"""
_PHONE = '<meta name="viewport" content="width=device-width, initial-scale=1">'


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page around its parts, which needs no other file."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{_PHONE}<title>{escape(title)}</title>'
    head += f"<style>{_STYLE}</style><script>{_SCRIPT}</script>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def table(head: Sequence[str], body: str) -> str:
    """Return a table of rows made by `row`; it scrolls sideways on a narrow page."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="table"><table><tr>{titles}</tr>{body}</table></div>'


def row(cells: Sequence[str], kind: str = "") -> str:
    """Return a table row of text cells, with `kind` as its class."""
    return f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def image(file: Path, alt: str) -> str:
    """Return an image with a PNG file embedded."""
    return f'<img alt="{escape(alt)}" src="{_inline(file, "image/png")}">'


def video(file: Path, caption: str = "") -> str:
    """Return a looping player with an mp4 file embedded, over its caption; see `player_controls`.

    A small video is enlarged by a whole factor with its pixels square.
    """
    from stdit_data.video.probe import probe  # with torch

    width = probe(str(file)).width
    factor = max(math.ceil(SHOWN / width), 1)
    shown, kind = min(factor * width, WIDEST), ' class="small"' if factor > 1 else ""
    player = f'<video{kind} autoplay loop muted playsinline tabindex="0" src="{_inline(file, "video/mp4")}"></video>'
    return f'<figure style="width: {shown}px">{player}<figcaption>{escape(caption)}</figcaption></figure>'


def player_controls() -> str:
    """Return the buttons for all videos of a page; controls inside the players would cover small videos."""
    buttons = {
        "pause all": "all(video => video.pause())",
        "play all": "all(video => video.play())",
        "all from the start": "all(video => { video.currentTime = 0; video.play() })",
    }
    shown = " ".join(f'<button onclick="{escape(action)}">{name}</button>' for name, action in buttons.items())
    return f"<p>{shown} A click on a video pauses it, or plays it on.</p>"


def listing(text: str, title: str, opened: bool) -> str:
    """Return a text with its line breaks, under a title that opens and closes it."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _inline(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
