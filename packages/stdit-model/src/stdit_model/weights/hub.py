"""Resolve a path or a Hugging Face Hub id to local files."""

import re
import time
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors

from stdit_model.errors import WeightsError, WeightsFileNotFoundError, reason

_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")
_NAME = r"[\w][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:/(.+))?")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # of downloads
PATIENCE = 5.0  # seconds for the Hub to accept a connection, and again to answer
REMEMBERED = 60.0  # seconds for which whether the Hub answers is not asked again


def split_hub_id(name: str) -> tuple[str, str] | None:
    """Split a Hub id into "owner/name" and the path inside the repository, "" if none; None if it cannot be an id."""
    match = _HUB_ID.fullmatch(name)
    if match is None or (match[2] is None and name.endswith(_WEIGHTS)):
        return None
    return match[1], match[2] or ""


def local_path(path_or_hub_id: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """Resolve a path or Hub id to a local path, downloading from the Hub to its cache if needed.

    Args:
        path_or_hub_id: a path; or a Hub id "owner/name", for the weights at the top of the repository or in its
            `transformer/`; or "owner/name/path/in/it" for one file (recognised by its suffix) or folder of it.
        subfolder: a folder inside it.
        options: of huggingface_hub's downloads: cache_dir, revision, token, local_files_only, force_download.

    Raises:
        WeightsFileNotFoundError: no such path, and it cannot be a Hub id or its first folder exists locally.
        WeightsError: the download failed (no such repository, no network, or HF_HUB_OFFLINE and not in the cache).
    """
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        path = path / (subfolder or "")
        if not path.exists():
            raise WeightsFileNotFoundError(f"{path}: no such folder")
        return path
    name = str(path_or_hub_id)
    hub_id = split_hub_id(name)
    if hub_id is None or Path(path.parts[0]).is_dir():  # a mistyped path: do not wait for the network
        raise WeightsFileNotFoundError(f"{name}: no such file or folder")
    repo, inside = hub_id[0], "/".join(part for part in (hub_id[1], subfolder) if part)
    options |= hub_options()
    try:
        if inside.endswith(_WEIGHTS):
            return Path(hf_hub_download(repo, inside, **options))
        folders = [f"{inside}/"] if inside else ["", "transformer/"]
        files = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json")
        patterns = [folder + file for folder in folders for file in files]
        folder = Path(snapshot_download(repo, allow_patterns=patterns, **options)) / inside
    except (OSError, ValueError) as error:  # which the Hub's errors derive from
        folder_name = repo.split("/")[1]
        fetch = f"hf download {repo} {inside}".rstrip() if inside.endswith(_WEIGHTS) else f"hf download {repo}"
        raise WeightsError(
            f"{name}: no such file or folder, and not available from the Hub ({hub_reason(error)}); check "
            f"the name, the network and HF_HUB_OFFLINE, or run `{fetch} --local-dir {folder_name}` where there is a "
            f"network, copy it here and pass {'/'.join(filter(None, (folder_name, inside)))}"
        ) from error
    if not folder.is_dir() or not any(folder.rglob("diffusion_pytorch_model*")):
        raise WeightsError(
            f"{name}: no diffusers weights in this Hub repository; name a file of it, as in {repo}/FILE.pth"
        )
    return folder


def unreachable() -> str | None:
    """Return why the Hub cannot be asked, in a few words; None if it answers.

    One request without retries, whose outcome is remembered for a minute. The libraries would try each file again and
    again, for a minute and with a warning each time.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _ask(constants.ENDPOINT, int(time.monotonic() // REMEMBERED))


def hub_options(source: str | Path | None = None) -> dict[str, Any]:
    """Return options for a download or a `from_pretrained`: the cache alone if the Hub cannot be asked.

    Args:
        source: folder or Hub id; the Hub is not asked for what exists locally.
    """
    local = source is not None and Path(source).exists()
    return {} if local or unreachable() is None else {"local_files_only": True}


def hub_reason(error: BaseException, source: str | Path | None = None) -> str:
    """Return why something is not available from the Hub, or from `source` if that exists locally, in a few words."""
    if source is not None and Path(source).exists():
        return reason(error)
    if (down := unreachable()) is not None:
        return f"not in the cache, and {down}"
    if isinstance(error, hub_errors.GatedRepoError):
        return "its licence has to be accepted on its page, then `hf auth login`"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "no such repository, or a private one: `hf auth login`"
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(error, hub_errors.LocalEntryNotFoundError):
        return "the repository has no such file"
    return reason(error)


@lru_cache(maxsize=4)
def _ask(endpoint: str, _period: int) -> str | None:
    """Ask whether an endpoint answers; in a thread, since no timeout holds for the look-up of its name."""
    answers = SimpleQueue[str | None]()

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=PATIENCE).status_code
            answers.put(None if status < 500 else f"HTTP status {status}")
        except Exception as error:  # of httpx or requests, as huggingface_hub has it
            answers.put(_root(error))

    Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * PATIENCE)
    except Empty:
        answer = f"no answer within {2 * PATIENCE:.0f} s"
    return None if answer is None else f"{endpoint} cannot be reached ({answer})"


def _root(error: BaseException) -> str:
    """The system's words on why a connection failed, from below the libraries' own."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__cause__ or below.__context__
    return reason(error)
