"""Read and check settings: stages and curricula from TOML, saved settings from JSON, overrides by dotted key."""

import json
import logging
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stdit_data.errors import StoreError
from stdit_data.storage import atomic, files, stores
from stdit_model.errors import reason
from stdit_train.assets import DEMO, is_demo_folder
from stdit_train.config.keys import RENAMED, did_you_mean, known_keys, unknown_key
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

CURRICULUM_FILE = "schedule.json"  # in a curriculum's folder, beside the run folders of its stages
# What runs did whose saved settings are older than a setting, where it is no default.
BEFORE = {"draw": "mt19937", "reduce_once": False}
_STAGE_ORDER = ("16x256", "16x256-hq", "16x512", "64x512", "360x512", "demo")

logger = logging.getLogger(__name__)


# -- stages ------------------------------------------------------------------------------------------------------------


def stage_names() -> list[str]:
    """Return the names of the stages: the published ones in their order, the demo, then any others."""
    return sorted(
        _toml_names("stages"), key=lambda name: (_STAGE_ORDER.index(name) if name in _STAGE_ORDER else 99, name)
    )


def load_stage(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the settings of a stage, with overrides by dotted key.

    Raises:
        ConfigError: no such stage or key, or a value of the wrong type or out of bounds.
    """
    return from_dict(set_values(stage_values(name), overrides or {}))


def stage_values(name: str) -> dict[str, Any]:
    """Return what the TOML file of a stage sets, as nested plain values.

    Raises:
        ConfigError: no such stage.
    """
    return {"stage": name, **_read_toml("stages", "stage", name, stage_names())}


# -- curricula ---------------------------------------------------------------------------------------------------------


def curriculum_names() -> list[str]:
    """Return the names of the curricula."""
    return sorted(_toml_names("curricula"))


def curriculum_summary(name: str) -> str:
    """Return what a curriculum does, in one line."""
    return str(_read_curriculum_toml(name)["about"])


def load_curriculum(name: str, overrides: Mapping[str, Any] | None = None) -> list[TrainConfig]:
    """Return the settings of a curriculum's stages, in order.

    Args:
        name: of the curriculum.
        overrides: by dotted key for all stages, or by "STAGE/KEY" for one. `init` is for the first stage; the others
            start from the stage before. Where a part is trained, all stages have the frozen rest from it.

    Raises:
        ConfigError: no such curriculum, stage or key, or a value of the wrong type or out of bounds.
    """
    entries = _read_curriculum_toml(name)["stage"]
    _check_stages(name, [entry["name"] for entry in entries], overrides or {})
    configs = []
    for number, entry in enumerate(entries):
        own = {key: value for key, value in entry.items() if key not in ("name", "from")}
        values = stage_values(entry.get("from", entry["name"]))
        values = set_values(values, flatten(own)) | {"stage": entry["name"]}
        values = set_values(values, _of_stage(overrides or {}, entry["name"]))
        config = from_dict(values)
        configs.append(config if number == 0 or config.partial else replace(config, init=None))
    return configs


def write_curriculum(folder: Path, name: str, configs: Sequence[TrainConfig]) -> None:
    """Save the settings of a curriculum's stages in its folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"schedule": name, "stages": [to_dict(config) for config in configs]}
    atomic.replace_text(folder / CURRICULUM_FILE, json.dumps(values, indent=1) + "\n")


def read_curriculum(folder: Path, overrides: Mapping[str, Any]) -> tuple[str, list[TrainConfig]]:
    """Read back what `write_curriculum` saved.

    Args:
        folder: of the curriculum.
        overrides: see `load_curriculum`.

    Returns:
        Name of the curriculum and settings of its stages.

    Raises:
        ConfigError: a damaged file, no such stage or key, or a value of the wrong type or out of bounds.
    """
    saved = read_settings(folder / CURRICULUM_FILE)
    name, stages = saved.get("schedule"), saved.get("stages")
    if not isinstance(name, str) or not isinstance(stages, list):
        raise ConfigError(f"{folder / CURRICULUM_FILE} is damaged: expected `schedule` and `stages`")
    _check_stages(name, [values["stage"] for values in stages], overrides)
    return name, [from_dict(set_values(BEFORE | values, _of_stage(overrides, values["stage"]))) for values in stages]


# -- values ------------------------------------------------------------------------------------------------------------


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` strings, each value as TOML or, failing that, as a string.

    Raises:
        ConfigError: no "=".
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key:
            raise ConfigError(f"--set {setting}: expected key=value, for instance optimizer.lr=1e-4")
        stage, slash, name = key.rpartition("/")
        if name in RENAMED:
            logger.warning("--set %s: use %s; the old name will be removed in 0.3", name, RENAMED[name])
        try:
            overrides[stage + slash + RENAMED.get(name, name)] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[stage + slash + RENAMED.get(name, name)] = value
    return overrides


def read_own_settings(file: Path) -> dict[str, Any]:
    """Read a user's TOML file in the form of a stage's: settings by dotted key, and `stage`, which they are laid over.

    Raises:
        ConfigError: it cannot be read, or has an unknown key; the message names it.
    """
    try:
        values = flatten(_with_current_names(tomllib.loads(file.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"--config {file}: not a TOML file: {error}") from error
    for key in values:
        if key not in known_keys():
            raise ConfigError(f"--config {file}: unknown setting {key!r}{did_you_mean(key, known_keys())}")
    return values


def set_values(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested plain values with overrides by dotted key.

    Raises:
        ConfigError: an unknown key; the message names the nearest known ones.
    """
    values = _with_current_names(values)
    for given, value in overrides.items():
        key = RENAMED.get(given, given)
        if key not in known_keys():
            raise unknown_key(key)
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section[parent] = dict(section.get(parent, {}))
            section = section[parent]
        section[leaf] = value
    return values


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Build and check settings from nested plain values.

    Raises:
        ConfigError: the first key that is unknown, missing, of the wrong type or out of bounds.
    """
    try:
        return _adapter().validate_python(_with_current_names(values))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error" and isinstance(cause := first["ctx"]["error"], ConfigError):
            raise cause from None
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise unknown_key(path) from None
        if first["type"] == "missing":
            raise ConfigError(f"{path} is not set") from None
        key = next((known for known in known_keys() if f"{path}.".startswith(f"{known}.")), path)
        raise ConfigError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}") from None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return settings as nested plain values for JSON, which `from_dict` reads."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def has_settings(file: Path) -> bool:
    """Return whether a file exists, waiting while the disk fails.

    Raises:
        StoreError: the disk does not answer.
    """
    return files.exists(str(file))


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, waiting while the disk fails.

    Raises:
        ConfigError: it cannot be read or holds something else; the message names the file.
        StoreError: the disk does not answer.
    """
    try:
        values = json.loads(stores.retry(str(file), lambda: file.read_text(encoding="utf-8"), local=True))
    except StoreError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is damaged: expected an object, not {type(values).__name__}")
    return values


def _with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as 0.1 wrote them under their current names: renamed keys, "demo" for its path."""
    sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for old, new in RENAMED.items():
        section, _, old_leaf = old.rpartition(".")
        part, new_leaf = sections.get(section) if section else sections, new.rpartition(".")[2]
        if isinstance(part, dict) and old_leaf in part:
            part.setdefault(new_leaf, part.pop(old_leaf))
    if isinstance(data := sections.get("data"), dict):
        data |= {key: DEMO for key in ("vae", "text_encoder") if is_demo_folder(str(data.get(key, "")))}
    return sections


def _check_stages(name: str, stages: list[str], overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        stage, slash, _ = key.rpartition("/")
        if slash and stage not in stages:
            known = ", ".join(stages)
            raise ConfigError(
                f"--set {key}: curriculum {name} has no stage {stage!r}{did_you_mean(stage, stages)}; it has {known}"
            )


def _of_stage(overrides: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return the overrides for all stages, then those for one."""
    own = {key.removeprefix(f"{stage}/"): value for key, value in overrides.items() if key.startswith(f"{stage}/")}
    return {key: value for key, value in overrides.items() if "/" not in key} | own


def _toml_names(folder: str) -> list[str]:
    paths = resources.files("stdit_train.config").joinpath(folder).iterdir()
    return [path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml")]


def _read_toml(folder: str, kind: str, name: str, known: list[str]) -> dict[str, Any]:
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}{did_you_mean(name, known)}")
    file = resources.files("stdit_train.config").joinpath(folder, f"{name}.toml")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read_curriculum_toml(name: str) -> dict[str, Any]:
    return _read_toml("curricula", "curriculum", name, curriculum_names())


@cache
def _adapter() -> "TypeAdapter[TrainConfig]":
    return TypeAdapter(TrainConfig)
