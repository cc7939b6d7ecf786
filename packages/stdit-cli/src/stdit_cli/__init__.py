"""The `stdit` command: `from stdit_cli import app` is its Typer application, imported when it is first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdit_cli.main import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from stdit_cli import main

        return getattr(main, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
