"""Read a pipeline's model_index.json, from a folder or the Hub, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from stdit_model.errors import WeightsError
from stdit_model.sampling.components import PARTS
from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import HUB_OPTIONS, hub_options, hub_reason, split_hub_id

INDEX = "model_index.json"
HUB_COMPONENTS = "_hub_components"  # key: Hub ids of components that are not in the folder
BARE = ("STDiT", "PixArtTransformer2DModel")  # classes of transformers that can be loaded
ONLY = "only pipelines around an STDiT or a PixArt can be loaded"


def check_class(index: Path, name: str) -> None:
    """Check that a model_index.json is of an `STDiTPipeline`.

    Raises:
        WeightsError: it is of another pipeline; the message names it, and what loads it if anything here does.
    """
    found = read_json(index) if index.is_file() else {}
    if found.get("_class_name") not in ("STDiTPipeline", None):
        transformer = (found.get("transformer") or [None, None])[1]
        advice = "STDiTPipeline.from_released loads it" if transformer in BARE else ONLY
        raise WeightsError(f"{name}: a {found['_class_name']} around a {transformer}, not an STDiTPipeline; {advice}")


def own_parts(path_or_hub_id: str | Path) -> dict[str, str]:
    """Return the sources of the components of a pipeline folder or Hub id of any class; {} for weights alone.

    Raises:
        WeightsError: a pipeline whose transformer is neither an STDiT nor a PixArt; nothing but its model_index.json is
            downloaded before.
    """
    index = find_index(path_or_hub_id)
    if index is None:
        return {}
    found = read_json(index)
    transformer = (found.get("transformer") or [None, None])[1]
    if transformer not in BARE:
        raise WeightsError(f"{path_or_hub_id}: a {found.get('_class_name')} around a {transformer}; {ONLY}")
    named = found.get(HUB_COMPONENTS, {})
    parts = {part: f"{path_or_hub_id}/{part}" for part in PARTS if (found.get(part) or [None])[0] is not None}
    return {**parts, **named}


def find_index(path_or_hub_id: str | Path) -> Path | None:
    """Return the model_index.json of a folder or Hub id; None for weights alone."""
    path, hub_id = Path(path_or_hub_id).expanduser(), split_hub_id(str(path_or_hub_id))
    if path.exists():
        return path / INDEX if (path / INDEX).is_file() else None
    if hub_id is None or hub_id[1] or Path(path.parts[0]).is_dir():
        return None
    try:
        return hub_index(hub_id[0])
    except WeightsError:  # a repository of weights alone; if it cannot be reached, they cannot either
        return None


def hub_index(repo: str, options: Mapping[str, Any] | None = None) -> Path:
    """Return a pipeline's model_index.json from the Hub or its cache.

    Args:
        repo: Hub id.
        options: those of a download among them are used: cache_dir, revision, token and so on.

    Raises:
        WeightsError: not available; the message says why, and how to download it.
    """
    chosen = {key: value for key, value in (options or {}).items() if key in HUB_OPTIONS}
    try:
        return Path(hf_hub_download(repo, INDEX, **{**chosen, **hub_options()}))
    except (OSError, ValueError) as error:  # which the Hub's errors derive from
        here = repo.split("/")[1]
        raise WeightsError(
            f"{repo}: no such folder, and no pipeline of this name on the Hub ({hub_reason(error)}); check the name, "
            f"or run `hf download {repo} --local-dir {here}` where there is a network, and pass that folder"
        ) from error
