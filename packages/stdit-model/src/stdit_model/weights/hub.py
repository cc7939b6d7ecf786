"""From what a user names, a path or a model of the Hugging Face Hub, to files on this machine."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from stdit_model.errors import WeightsError

_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")
_NAME = r"[\w][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:/(.+))?")


def split_hub_id(name: str) -> tuple[str, str] | None:
    """("owner/name", "path/in/it" or "") of a Hub id; None if it can't be one."""
    match = _HUB_ID.fullmatch(name)
    if match is None or (match[2] is None and name.endswith(_WEIGHTS)):
        return None
    return match[1], match[2] or ""


def local_path(path_or_hub_id: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """A file or folder as named, or what the Hub has under that id, downloaded once to its cache.

    Args:
        path_or_hub_id: a path; or a Hub id "owner/name", of which the weights at the top or in `transformer/` are
            fetched; or "owner/name/path/in/it" for one file (by its suffix) or one folder of that repository.
        subfolder: a folder inside it.
        options: for huggingface_hub's downloads: cache_dir, revision, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: it can only be a path, or its first folder exists here, and nothing is there.
        WeightsError: the Hub doesn't give it (no such model, no network, or HF_HUB_OFFLINE and not in the cache).
    """
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        path = path / (subfolder or "")
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder")
        return path
    name = str(path_or_hub_id)
    hub_id = split_hub_id(name)
    if hub_id is None or Path(path.parts[0]).is_dir():  # a mistyped path is not worth a wait for the network
        raise FileNotFoundError(f"{name}: no such file or folder")
    repo, inside = hub_id[0], "/".join(part for part in (hub_id[1], subfolder) if part)
    try:
        if inside.endswith(_WEIGHTS):
            return Path(hf_hub_download(repo, inside, **options))
        folders = [f"{inside}/"] if inside else ["", "transformer/"]
        files = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json")
        patterns = [folder + file for folder in folders for file in files]
        folder = Path(snapshot_download(repo, allow_patterns=patterns, **options)) / inside
    except (OSError, ValueError) as error:  # the Hub's errors derive from these
        reason = str(error).strip().splitlines()[0].rstrip(".")
        folder_name = repo.split("/")[1]
        fetch = f"hf download {repo} {inside}".rstrip() if inside.endswith(_WEIGHTS) else f"hf download {repo}"
        raise WeightsError(
            f"{name}: no such file or folder here, and the Hub did not give it ({reason}); check the name, the network "
            f"and HF_HUB_OFFLINE; or where there is a network `{fetch} --local-dir {folder_name}`, bring that here and "
            f"name it {'/'.join(filter(None, (folder_name, inside)))}"
        ) from error
    if not folder.is_dir() or not any(folder.rglob("diffusion_pytorch_model*")):
        raise WeightsError(
            f"{name}: this Hub repository has no diffusers weights there: name the file, as in {repo}/FILE.pth"
        )
    return folder
