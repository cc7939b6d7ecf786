"""Write settings as TOML, as a person writes them."""

import json
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any]) -> str:
    """Return nested plain values as TOML: those of the top level, then a table per section; None is left out."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    blocks = [_lines(plain)] if plain else []
    blocks += [f"[{key}]\n{_lines(part)}" for key, part in values.items() if isinstance(part, Mapping)]
    return "\n".join(blocks)


def toml_value(value: Any) -> str:
    """Return a number, string, boolean or list as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return str(value)  # JSON spells inf in another way
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items() if value is not None)
