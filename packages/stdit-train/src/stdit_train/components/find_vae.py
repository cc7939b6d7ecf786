"""Tell whether a name stands for a VAE by itself, without loading it."""

from pathlib import Path

from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import hub_options, split_hub_id
from stdit_train.config.load import from_dict, read_settings
from stdit_train.errors import ConfigError

VAE_CLASSES = ("Autoencoder", "CausalVideoVAE")  # how the names of the classes begin


def find_vae(source: str) -> str | None:
    """Return the place of a VAE that a name stands for, None where it stands for something else.

    Args:
        source: a VAE's folder or Hub id, or the run folder of one.

    Raises:
        ConfigError: the run folder of a VAE that has not been saved yet.
        WeightsError: a damaged config.json.
    """
    folder = Path(source).expanduser()
    if (folder / "run.json").is_file() and (folder / "config.json").is_file():
        if from_dict(read_settings(folder / "config.json")).network != "vae":
            return None
        if not (folder / "vae").is_dir():
            raise ConfigError(f"{folder} is a run that has saved no VAE yet: let it finish")
        return str(folder / "vae")
    config = folder / "config.json"
    if not folder.exists() and (hub_id := split_hub_id(source)) is not None:
        from huggingface_hub import hf_hub_download

        try:
            repo, inside = hub_id
            config = Path(hf_hub_download(repo, f"{inside}/config.json".lstrip("/"), **hub_options()))
        except (OSError, ValueError):  # a pipeline has none, and one that cannot be fetched is reported later
            return None
    if not config.is_file():
        return None
    return source if str(read_json(config).get("_class_name", "")).startswith(VAE_CLASSES) else None
