"""The configuration of a training run: frozen dataclasses, stages as TOML, `key=value` overrides.

Sizes are in frames and pixels, times in steps unless a name says otherwise.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from stdit_data.files import replace_text
from stdit_train.assets import DEMO, is_demo_folder
from stdit_train.checks import check
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError as ConfigError  # re-exported: settings and their error go together


def stage_names() -> list[str]:
    """The stages that can be trained, the published ones in their order, then the demo."""
    names = [
        path.name.removesuffix(".toml") for path in resources.files("stdit_train.config").joinpath("stages").iterdir()
    ]
    order = ["16x256", "16x256-hq", "16x512", "64x512", "360x512", "demo"]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def load_stage(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of a stage, with overrides of its fields by dotted key.

    Raises:
        ConfigError: no such stage, no such key, or a value of the wrong type.
    """
    return from_dict(set_values(stage_values(name), overrides or {}))


def stage_values(name: str) -> dict[str, Any]:
    """What a stage sets, as nested plain values.

    Raises:
        ConfigError: no such stage.
    """
    if name not in stage_names():
        known = stage_names()
        raise ConfigError(f"unknown stage {name!r}: choose one of {', '.join(known)}{like(name, known)}")
    return {
        "stage": name,
        **tomllib.loads(resources.files("stdit_train.config").joinpath("stages", f"{name}.toml").read_text()),
    }


def set_values(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys in nested plain values, and return these.

    Raises:
        ConfigError: an unknown key; the message names its nearest neighbours.
    """
    for key, value in overrides.items():
        if key not in _keys():
            raise _unknown_key(key)
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return values


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Validate nested plain values.

    Raises:
        ConfigError: the first key that is unknown or has a value of the wrong type.
    """
    try:
        config = TypeAdapter(TrainConfig).validate_python(_upgraded(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _unknown_key(key) from None
        if first["type"] == "missing":
            raise ConfigError(f"{key} is not set") from None
        raise ConfigError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}") from None
    check(config)
    return config


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as 0.1 saved them, in the words of today."""
    values = dict(values)
    if isinstance(data := values.get("data"), Mapping):
        sources = {key: DEMO for key in ("vae", "text_encoder") if is_demo_folder(str(data.get(key, "")))}
        values["data"] = {**data, **sources}
    return values


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The opposite of `from_dict`: plain values, fit for JSON."""
    return json.loads(json.dumps(asdict(config)))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings to values, each read as TOML; what is no TOML is a string.

    Raises:
        ConfigError: no "=".
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: expected key=value, for instance optimizer.lr=1e-4")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = value
    return overrides


def _keys(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """Every settable key, dotted."""
    keys = []
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            keys += _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def _unknown_key(key: str) -> ConfigError:
    if "/" in key:
        return ConfigError(f"--set {key}: STAGE/KEY is for the stages of a --schedule; a single stage takes KEY=VALUE")
    return ConfigError(f"unknown setting {key!r}{like(key, _keys()) or '; known are ' + ', '.join(_keys())}")


def like(name: str, known: list[str]) -> str:
    """A question that ends an error, with the nearest of the known names; empty where none is near."""
    leaf = name.split(".")[-1]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [key for key in known if key.split(".")[-1] == leaf and key not in near]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


SCHEDULE_FILE = "schedule.json"  # what a schedule's folder holds beside the run folders of its stages


def schedule_names() -> list[str]:
    """The schedules that there are."""
    folder = resources.files("stdit_train.config").joinpath("curricula")
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir())


def schedule_about(name: str) -> str:
    """What a schedule does, in one line."""
    return _read(name)["about"]


def load_schedule(name: str, overrides: Mapping[str, Any] | None = None) -> list[TrainConfig]:
    """The configurations of a schedule's stages, in order.

    Args:
        name: of the schedule.
        overrides: by dotted key for all stages, or by "STAGE/KEY" for one.

    Raises:
        ConfigError: no such schedule, stage or key, or a value of the wrong type.
    """
    entries = _read(name)["stage"]
    _check_stages(name, [entry["name"] for entry in entries], overrides or {})
    configs = []
    for number, entry in enumerate(entries):
        own = {key: value for key, value in entry.items() if key not in ("name", "from")}
        values = stage_values(entry.get("from", entry["name"]))
        values = set_values(values, flat(own)) | {"stage": entry["name"]}
        config = from_dict(set_values(values, _for_stage(overrides or {}, entry["name"])))
        if number and config.init is not None:  # what --init gives is for the first; the others are handed theirs
            config = from_dict(to_dict(config) | {"init": None})
        configs.append(config)
    return configs


def write_schedule(folder: Path, name: str, configs: Sequence[TrainConfig]) -> None:
    """Make a schedule's folder, or save its changed settings."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"schedule": name, "stages": [to_dict(config) for config in configs]}
    replace_text(folder / SCHEDULE_FILE, json.dumps(values, indent=1) + "\n")


def read_schedule(folder: Path, overrides: Mapping[str, Any]) -> tuple[str, list[TrainConfig]]:
    """Name and configurations of a schedule that was started, with overrides (see `load_schedule`).

    Raises:
        ConfigError: no such stage or key, or a value of the wrong type.
    """
    saved = read_settings(folder / SCHEDULE_FILE)
    _check_stages(saved["schedule"], [values["stage"] for values in saved["stages"]], overrides)
    configs = [from_dict(set_values(values, _for_stage(overrides, values["stage"]))) for values in saved["stages"]]
    return saved["schedule"], configs


def _read(name: str) -> dict[str, Any]:
    if name not in schedule_names():
        known = schedule_names()
        raise ConfigError(f"unknown schedule {name!r}: choose one of {', '.join(known)}{like(name, known)}")
    return tomllib.loads(resources.files("stdit_train.config").joinpath("curricula", f"{name}.toml").read_text())


def _check_stages(name: str, stages: list[str], overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        stage, slash, _ = key.rpartition("/")
        if slash and stage not in stages:
            known = ", ".join(stages)
            raise ConfigError(
                f"--set {key}: schedule {name} has no stage {stage!r}{like(stage, stages)}; it has {known}"
            )


def _for_stage(overrides: Mapping[str, Any], stage: str) -> dict[str, Any]:
    own = {key.removeprefix(f"{stage}/"): value for key, value in overrides.items() if key.startswith(f"{stage}/")}
    return {key: value for key, value in overrides.items() if "/" not in key} | own


def read_settings(file: Path) -> dict[str, Any]:
    """An object of a JSON file of ours.

    Raises:
        ConfigError: it is none; the message names the file.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is damaged: an object expected, not {type(values).__name__}")
    return values
