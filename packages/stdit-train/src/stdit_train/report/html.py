"""Build self-contained HTML pages: style, tables, and files as data URLs."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ccc; --marked: #fff4d6; --quiet: #555 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #1b1b1b; --line: #555; --marked: #4a3f1c; --quiet: #aaa }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
body { color: var(--text); background: var(--page) }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere } code { overflow-wrap: anywhere }
img { max-width: 100%; background: #fff }
.table { overflow-x: auto; margin: 1em 0 } table { border-collapse: collapse }
td, th { border: 1px solid var(--line); padding: .2em .6em; text-align: left }
tr.differs td { background: var(--marked) } video { width: 128px; image-rendering: pixelated; background: #8884 }
figure { display: inline-block; margin: .3em; vertical-align: top; width: 128px; font-size: 12px }
figcaption { color: var(--quiet) }
"""
_PHONE = '<meta name="viewport" content="width=device-width, initial-scale=1">'


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page around its parts."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{_PHONE}<title>{escape(title)}</title>'
    head += f"<style>{_STYLE}</style>"
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
    """Return a player with an mp4 file embedded, over its caption."""
    player = f'<video autoplay loop muted playsinline controls src="{_inline(file, "video/mp4")}"></video>'
    return f"<figure>{player}<figcaption>{escape(caption)}</figcaption></figure>"


def _inline(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
