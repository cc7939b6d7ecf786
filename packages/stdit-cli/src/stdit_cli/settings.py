"""Commands with --set, which tell of an option that they do not have what to set in its place."""

from typing import Any

from typer.core import TyperCommand

PARTS = {"size": ("height", "width")}


class SettingsCommand(TyperCommand):
    """A command with --set KEY=VALUE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; the error of an unknown option names the settings of that name."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", None)
            if name is not None and (instead := self._instead(name.lstrip("-").replace("-", "_"))):
                error.message, error.possibilities = f"No such option: {name}: give {instead}", None  # type: ignore[attr-defined]
            raise

    def _instead(self, name: str) -> str:
        """Return the options that set what an unknown one is for; empty if nothing has its name."""
        from stdit_train.config.keys import known_keys

        options = {option for parameter in self.params for option in parameter.opts}
        found = []
        for part in PARTS.get(name, (name,)):
            keys = [f"--set {key}=..." for key in known_keys() if key.rpartition(".")[2] == part]
            found.append(f"--{part}" if f"--{part}" in options else " or ".join(keys))
        return " and ".join(filter(None, found))
