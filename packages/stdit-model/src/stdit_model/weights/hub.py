"""Resolve a path or a Hugging Face Hub id to local files."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from stdit_model.errors import WeightsError, WeightsFileNotFoundError

_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")
_NAME = r"[\w][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:/(.+))?")


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
            `transformer/`; or "owner/name/path/in/it" for one file (told by its suffix) or folder of it.
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
    try:
        if inside.endswith(_WEIGHTS):
            return Path(hf_hub_download(repo, inside, **options))
        folders = [f"{inside}/"] if inside else ["", "transformer/"]
        files = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json")
        patterns = [folder + file for folder in folders for file in files]
        folder = Path(snapshot_download(repo, allow_patterns=patterns, **options)) / inside
    except (OSError, ValueError) as error:  # which the Hub's errors derive from
        reason = str(error).strip().splitlines()[0].rstrip(".")
        folder_name = repo.split("/")[1]
        fetch = f"hf download {repo} {inside}".rstrip() if inside.endswith(_WEIGHTS) else f"hf download {repo}"
        raise WeightsError(
            f"{name}: no such file or folder, and not available from the Hub ({reason}); check the name, the network "
            f"and HF_HUB_OFFLINE, or run `{fetch} --local-dir {folder_name}` where there is a network, copy it here "
            f"and pass {'/'.join(filter(None, (folder_name, inside)))}"
        ) from error
    if not folder.is_dir() or not any(folder.rglob("diffusion_pytorch_model*")):
        raise WeightsError(
            f"{name}: no diffusers weights in this Hub repository; name a file of it, as in {repo}/FILE.pth"
        )
    return folder
