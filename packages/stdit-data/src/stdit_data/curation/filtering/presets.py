"""Load named sets of thresholds, each with its source, from the TOML files in the folder `presets`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from stdit_data.curation.filtering.expression import Condition
from stdit_data.errors import DataError


@dataclass(frozen=True)
class PresetRule:
    """One threshold of a preset, with its source.

    Attributes:
        keep: the condition.
        source: where the number was published, and what it was measured with.
        column_from: how to get a column that `stdit data score` does not write by itself.
    """

    keep: str
    source: str
    column_from: str = "stdit data score"


@dataclass(frozen=True)
class Preset:
    """A named set of thresholds.

    Attributes:
        name, description: for people.
        cut: arguments of `CutStep`.
        rules: what a clip must fulfil.
    """

    name: str
    description: str
    cut: dict[str, Any] = field(default_factory=dict)
    rules: tuple[PresetRule, ...] = ()

    def condition(self, columns: list[str], *, partly: bool = False) -> str:
        """Return all rules as one condition over a manifest's columns.

        Args:
            columns: that the manifest has.
            partly: leave out rules whose columns are missing, instead of refusing.

        Raises:
            DataError: columns are missing, with how to get each; or no rule is left.
        """
        missing = {rule: [name for name in Condition(rule.keep).columns if name not in columns] for rule in self.rules}
        usable = [rule.keep for rule, names in missing.items() if not names]
        lacking = [(name, rule) for rule, names in missing.items() for name in names]
        if lacking and not (partly and usable):
            listed = "; ".join(f"{name} (for {rule.keep}: {rule.column_from})" for name, rule in lacking)
            hint = "" if not usable else "; `partly=True` applies the other rules alone"
            raise DataError(f"preset {self.name} needs columns that the manifest lacks: {listed}{hint}")
        return " and ".join(f"({keep})" if " or " in keep else keep for keep in usable)


def preset_names() -> list[str]:
    """Return the names of all presets."""
    folder = resources.files("stdit_data.curation.filtering") / "presets"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """
    Raises:
        DataError: there is no such preset.
    """
    if name not in preset_names():
        raise DataError(f"no preset {name!r}; there are {', '.join(preset_names())}")
    text = (resources.files("stdit_data.curation.filtering") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    rules = tuple(PresetRule(**rule) for rule in data.get("rules", []))
    return Preset(name, data["description"], data.get("cut", {}), rules)
