"""Take paths and fsspec URLs apart and put them together, as text alone: `zip://a.mp4::/path/clips.zip` and so on.

A URL here is what fsspec calls one: a plain path, or `protocol://path`, with `::` between the layers of a chain.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from fsspec.core import split_protocol
from fsspec.registry import known_implementations

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv",
    ".3gp", ".gif",
))  # fmt: skip

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))


def layers(url: str) -> list[str]:
    """Split a URL into the layers of its chain: the file first, then the archives that hold it.

    `::` separates layers after a URL or a protocol alone. In a local path it is part of the name.
    """
    found = url.split("::")
    for i, layer in enumerate(found):
        if split_protocol(layer)[0] in (None, "file", "local") and layer not in known_implementations:
            return [*found[:i], "::".join(found[i:])]
    return found


def suffix(url: str) -> str:
    """Return the lower-case suffix of a URL: `.mp4` for `zip://a.MP4::/x.zip` and `https://host/a.mp4?key=1`."""
    head = layers(url)[0]
    if split_protocol(head)[0] in ("http", "https"):
        head = head.split("?")[0].split("#")[0]
    return PurePosixPath(head).suffix.lower()


def is_image(url: str) -> bool:
    """Return whether a URL has the suffix of an image."""
    return suffix(url) in IMAGE_SUFFIXES


def is_media(url: str) -> bool:
    """Return whether a URL has the suffix of a video or an image."""
    return suffix(url) in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def is_local(url: str) -> bool:
    """Return whether a URL is a file or folder of the local file system."""
    return len(layers(url)) == 1 and split_protocol(url)[0] in (None, "file", "local")


def is_utf8(text: str) -> bool:
    """Return whether a text can be written in UTF-8, unlike a file name with other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(url: str) -> str:
    r"""Return a path or URL as text; bytes of a file name that are not UTF-8 are shown as `\xff`."""
    return url if is_utf8(url) else os.fsencode(url).decode(errors="backslashreplace")


def local_path(url: str) -> Path:
    """Return the path of a local URL, see `is_local`."""
    path = split_protocol(url)[1] if "://" in url else url
    return Path(os.path.expanduser(path))  # noqa: PTH111 - a Path is without "./", which tells ./~ from ~


def canonical(url: str) -> str:
    """Make a local path absolute; return any other URL as it is."""
    return os.path.abspath(local_path(url)) if is_local(url) else url  # noqa: PTH100 - Path.absolute keeps ".."


def parent(url: str) -> str:
    """Return the folder of a file, as a URL; for a file in an archive, the folder in that archive."""
    head, *rest = layers(url)
    protocol, path = split_protocol(head)
    folder = path.rsplit("/", 1)[0] if "/" in path else "" if protocol else "."
    return "::".join([f"{protocol}://{folder}" if protocol else folder or "/", *rest])


def join(folder: str, path: str) -> str:
    """Join a folder and a relative path; return an absolute path or a URL as it is."""
    head, *rest = layers(folder)
    local = split_protocol(head)[0] in (None, "file", "local")
    if "://" in path or len(layers(path)) > 1 or (path.startswith("/") and local):
        return path
    separator = "" if head.endswith("/") or not head else "/"
    return "::".join([f"{head}{separator}{path}", *rest])


def leads_out(folder: str, path: str) -> bool:
    """Return whether a path of a manifest leads out of a folder: absolute, a URL, by `..` or, if local, by a link.

    Args:
        folder: the folder that the path starts from; path or URL.
        path: the path, as the manifest has it.
    """
    if join(folder, path) == path or path.startswith("/"):
        return True
    plain = unquote(path) if layers(folder)[-1].startswith(("http://", "https://")) else path
    if ".." in plain.replace("\\", "/").split("/"):
        return True
    if not is_local(folder):
        return False
    return not local_path(join(folder, path)).resolve().is_relative_to(local_path(folder).resolve())


def protocols(url: str) -> list[str]:
    """Return the protocol of each layer of a URL; a layer without one as it is."""
    return [split_protocol(layer)[0] or layer for layer in layers(url)]
