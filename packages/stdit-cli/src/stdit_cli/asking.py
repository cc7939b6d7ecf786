"""From the options of `stdit sample` to one request: prompts from everywhere, and `--from` with what is said anew."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.request import PromptRequest, Request, Settings
from stdit_cli.prompt_files import read_prompts


def make_request(options: dict[str, Any]) -> Request:
    """The request of the options that were given; None is not among them.

    Raises:
        ValueError: no or an empty prompt, or options that contradict each other.
        FileNotFoundError: a file that is named and not there.
    """
    wanted = [PromptRequest(prompt) for prompt in options.get("prompts", ())]
    if not all(want.prompt.strip() for want in wanted):
        raise ValueError('the prompt is empty: say what the video should show, as in "a red circle moving left"')
    if "prompts_file" in options:
        wanted += read_prompts(options["prompts_file"])
    settings = {name: options[name] for name in (field.name for field in fields(Settings)) if name in options}
    names = ["num", "seed", "negative", "batch", "out", "format", "overwrite"]
    others: dict[str, Any] = {name: options[name] for name in names if name in options}
    if "from_" in options:
        return _again(options["from_"], wanted, settings, others)
    if not wanted:
        raise ValueError('no prompt: say what the video should show, as in stdit sample "a red circle moving left"')
    request = Request(wanted, Settings(**settings), **others)
    request.settings.check()
    return request


def _again(file: Path, wanted: list[PromptRequest], settings: dict[str, Any], others: dict[str, Any]) -> Request:
    """What a sidecar records, with what is asked for anew in its place."""
    recorded = sidecar.read(file)
    request = Request(
        wanted or [PromptRequest(recorded["prompt"])],
        replace(Settings(**recorded["settings"]), **settings),
        **{"seed": recorded["seed"], "negative": recorded["negative"], **others},
    )
    request.settings.check()
    changed = bool(wanted) or bool(settings) or bool(others.keys() - {"out", "format", "overwrite"})
    return request if changed else replace(request, recorded=recorded)
