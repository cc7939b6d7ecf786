"""Read a pipeline's model_index.json, without torch, and load its components other than the transformer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from stdit_model.errors import WeightsError, WeightsFileNotFoundError, reason
from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import HUB_OPTIONS, hub_options, hub_reason, split_hub_id

PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
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


def require(sources: Mapping[str, str | Path], **options: Any) -> None:
    """Check that components are available, by fetching a small file of each, so that all missing ones are named.

    Args:
        sources: a folder or a Hub id ("owner/name" or "owner/name/folder") by component.
        options: of huggingface_hub's downloads, such as cache_dir and token.

    Raises:
        WeightsFileNotFoundError: no such folder.
        WeightsError: components that are not available from the Hub, and the commands that download them.
    """
    failures: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for part, source in sources.items():
        if _folder(part, source) is None:
            repo = _hub_id(part, source)[0]
            try:
                _mark(part, source, **options)
            except (OSError, ValueError) as error:  # which the Hub's errors derive from
                failures.setdefault(repo, []).append(part)
                reasons[repo] = hub_reason(error)
    if failures:
        raise WeightsError(_advice(failures, reasons))


def load_part(part: str, source: str | Path, **options: Any) -> Any:
    """Load a component.

    Args:
        part: one of `PARTS`.
        source: its folder, a pipeline folder that has it, or a Hub id.
        options: of its class's `from_pretrained`, such as dtype or quantization_config.

    Raises:
        WeightsFileNotFoundError: no such folder.
        WeightsError: it cannot be read, or is not available from the Hub.
    """
    import diffusers
    import transformers

    from stdit_model.causal_vae.video_autoencoder import vae_class

    folder = _folder(part, source)
    classes: dict[str, Any] = {"text_encoder": transformers.T5EncoderModel, "tokenizer": transformers.AutoTokenizer}
    try:
        if part in ("vae", "scheduler"):
            mark = _mark(part, source, **{key: options[key] for key in HUB_OPTIONS if key in options})
            name = str(read_json(mark).get("_class_name")) if mark.is_file() else ""
            vae = part == "vae"
            classes[part] = vae_class(name) if vae else getattr(diffusers, name, diffusers.DDPMScheduler)
        if folder is not None:
            return classes[part].from_pretrained(folder, **options)
        repo, inside = _hub_id(part, source)
        if part == "tokenizer" and inside:  # AutoTokenizer would look for a config.json, which is not there
            whole = snapshot_download(repo, allow_patterns=f"{inside}/*", **{**options, **hub_options()})
            return classes[part].from_pretrained(Path(whole) / inside)
        options = {**options, **hub_options(), **({"subfolder": inside} if inside else {})}
        return classes[part].from_pretrained(repo, **options)
    except (OSError, ValueError) as error:
        if folder is not None:
            raise WeightsError(f"{folder}: not a readable {part.replace('_', ' ')} ({reason(error)})") from error
        repo = _hub_id(part, source)[0]
        raise WeightsError(_advice({repo: [part]}, {repo: hub_reason(error)})) from error


# A small file of each component.
_MARKS = {
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


def _mark(part: str, source: str | Path, **options: Any) -> Path:
    """Return the small file of a component, which is downloaded from the Hub if need be."""
    folder = _folder(part, source)
    if folder is not None:
        return folder / _MARKS[part]
    repo, inside = _hub_id(part, source)
    return Path(hf_hub_download(repo, "/".join(filter(None, (inside, _MARKS[part]))), **{**options, **hub_options()}))


def _folder(part: str, source: str | Path) -> Path | None:
    """Return a component's local folder, which may be inside a pipeline folder; None for a Hub id."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return None
    inner = path / part
    return inner if inner.is_dir() else path


def _hub_id(part: str, source: str | Path) -> tuple[str, str]:
    found = split_hub_id(str(source))
    if found is None:
        raise WeightsFileNotFoundError(
            f"{source}: neither a folder nor a Hub id (owner/name) for the {part.replace('_', ' ')}"
        )
    return found


def _advice(failures: Mapping[str, list[str]], reasons: Mapping[str, str]) -> str:
    """Describe in one line what is missing, why, and the commands that download it."""
    parts = "; ".join(f"{' and '.join(parts)} {repo}: not found ({reasons[repo]})" for repo, parts in failures.items())
    steps = "; ".join(
        f"`hf download {repo} --local-dir {repo.split('/')[1]}` and `{_argument(parts)}={repo.split('/')[1]}`"
        for repo, parts in failures.items()
    )
    return f"{parts}. Where there is a network: {steps}; or `hf download {next(iter(failures))}` into the Hub's cache"


def _argument(parts: list[str]) -> str:
    return "text_encoder" if "tokenizer" in parts else parts[0]
