"""What the buttons of the page do. Errors that a user can cause are one line on the page."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event
from typing import Any

import gradio as gr

from stdit_cli.commands.serve.examples import EXAMPLES
from stdit_cli.commands.serve.form import GUIDANCE_MAX, Form, on_page
from stdit_cli.commands.serve.limits import Limits, Own
from stdit_cli.commands.serve.maker import Made, Maker, Stopped
from stdit_data.errors import UserError as DataUserError
from stdit_model.errors import UserError as ModelUserError
from stdit_train.assets import DEMO
from stdit_train.errors import ConfigError
from stdit_train.errors import UserError as TrainUserError

USER_ERRORS = (ModelUserError, DataUserError, TrainUserError)
PROGRESS = gr.Progress()


class Actions:
    """The actions of a page.

    Args:
        maker: makes the videos.
        limits: of a request.
    """

    def __init__(self, maker: Maker, limits: Limits) -> None:
        self.maker, self.limits, self.names = maker, limits, list(maker.sources)
        self._stops: dict[Event, str] = {}  # one for each request under way, with its session

    def make(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Make the video of a form; returns updates of the fields of `page.Result`."""
        with errors_on_page(), self._under_way(str(request.session_hash)) as stop, suppress(Stopped):
            form = Form(*values)
            name = self._name(form.checkpoint)
            limits = self.limits.over(self.maker.own(name, stop))
            base = replace(self.maker.settings, checkpoint=name)
            asked = form.to_request(base, limits, self.maker.folder)
            progress(0, desc="Starting")
            made = self.maker.make(asked, lambda done, total: progress((done, total), unit="steps"), stop)
            return _show(made)
        return [gr.skip()] * 8

    @contextmanager
    def _under_way(self, session: str) -> Iterator[Event]:
        """Give what stops a request of a session. After Cancel, it may overlap with the session's next one."""
        stop = Event()
        self._stops[stop] = session
        try:
            yield stop
        finally:
            del self._stops[stop]

    def stop(self, request: gr.Request) -> list[Any]:
        """Cancel the video of a session; returns updates of the buttons."""
        self.leave(request)
        return on_buttons(busy=False)

    def leave(self, request: gr.Request) -> None:
        """Stop what is made for a session whose page was closed."""
        for stop, session in list(self._stops.items()):
            if session == str(request.session_hash):
                stop.set()

    def choose(self, event: gr.SelectData) -> list[Any]:
        """Choose an example; returns updates of all fields in the order of `Form`."""
        index = event.index if isinstance(event.index, int) and 0 <= event.index < len(EXAMPLES) else 0
        return [EXAMPLES[index], "", DEMO, None, 0, *self.change(DEMO)]

    def change(self, checkpoint: Any) -> list[Any]:
        """Choose another checkpoint; returns updates of the fields with numbers."""
        with errors_on_page(), suppress(Stopped):
            fields = numbers(self.maker.own(self._name(checkpoint)), self.limits)
            return [gr.Slider(**field) for field in fields.values()]
        return [gr.skip()] * 5

    def _name(self, checkpoint: Any) -> str:
        if checkpoint not in self.names:
            raise ConfigError(f"checkpoint {str(checkpoint)[:40]}: choose {', '.join(self.names)}")
        return str(checkpoint)


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show an error that a user can cause as one line on the page; any other is a bug, which the console shows."""
    try:
        yield
    except USER_ERRORS as error:
        message = on_page(str(error))
        raise gr.Error(message, title="This cannot be made", print_exception=False) from error


def numbers(own: Own, limits: Limits) -> dict[str, dict[str, Any]]:
    """Return value, bounds and step of each field with a number, in the order of `Form`."""
    limits = limits.over(own)
    assert limits.frames and limits.size and limits.steps
    side = 8 if own.height % 8 == own.width % 8 == 0 else 1
    return {
        "steps": {"value": min(own.steps, limits.steps), "minimum": 1, "maximum": limits.steps, "step": 1},
        "guidance": {"value": own.guidance, "minimum": 0, "maximum": GUIDANCE_MAX, "step": 0.1},
        "frames": {"value": min(own.frames, limits.frames), "minimum": 1, "maximum": limits.frames, "step": 1},
        "height": {"value": min(own.height, limits.size), "minimum": 8, "maximum": limits.size, "step": side},
        "width": {"value": min(own.width, limits.size), "minimum": 8, "maximum": limits.size, "step": side},
    }


def on_buttons(*, busy: bool) -> list[Any]:
    """Return updates of the buttons Generate and Cancel, of which one is there."""
    return [gr.Button(visible=not busy), gr.Button(visible=busy)]


def _show(made: Made) -> list[Any]:
    """Return updates of the fields of `page.Result`."""
    video, sidecar, sheet = str(made.video), str(made.sidecar), str(made.sheet)
    still = made.video.suffix == ".png"
    summary, *remarks = map(on_page, made.lines)
    lines = f"<p>{summary}</p>" + "".join(f"<p class='remark'>{line}</p>" for line in remarks)
    return [
        gr.Video(value=None if still else video, visible=not still),
        gr.Image(value=video if still else None, visible=still),
        gr.HTML(value=lines, visible=True),
        gr.Row(visible=True),
        gr.DownloadButton("↓ Picture" if still else "↓ Video", value=video),
        gr.DownloadButton(value=sidecar),
        gr.DownloadButton(value=sheet),
        gr.Image(value=sheet, visible=True),
    ]
