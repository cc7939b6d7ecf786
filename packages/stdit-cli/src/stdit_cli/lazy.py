"""A group whose commands are imported when they are called, the LazyGroup of Click's documentation.

To import all commands and to inspect their parameters takes as long as to import Typer.
"""

from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group


class Lazy(NamedTuple):
    """A command that is not imported yet.

    Attributes:
        place: module and name of its function, or of a Typer app, `module:name`.
        summary: first paragraph of its help, for the help of the group.
        cls: class of the command.
    """

    place: str
    summary: str
    cls: type[TyperCommand] = TyperCommand

    def load(self, name: str) -> Any:
        """Import the command, under a name."""
        module, _, attribute = self.place.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            group = get_group(found)
            group.name = name
            return group
        app = typer.Typer(add_completion=False)
        app.command(name, cls=self.cls)(found)
        return get_command(app)


class LazyGroup(TyperGroup):
    """A group with `lazy` commands. Derive from it to set them."""

    lazy: ClassVar[dict[str, Lazy]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, command in self.lazy.items():
            self.add_command(TyperCommand(name, help=command.summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments begin with, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.lazy[name].load(name) if name in self.lazy else command, rest
