"""The page: what is on it, and which action each of its buttons has."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import gradio as gr

from stdit_cli.commands.sample.request import SEED_MAX
from stdit_cli.commands.serve.actions import Actions, numbers, on_buttons
from stdit_cli.commands.serve.examples import EXAMPLES, example_files
from stdit_cli.commands.serve.form import Form
from stdit_cli.commands.serve.limits import Own
from stdit_train.assets import DEMO

FILES_ARE_KEPT = 3600  # seconds
SAFE_SEED = min(SEED_MAX, 2**53 - 1)  # the largest whole number that JavaScript has
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Crect width='32' height='32' "
    "rx='7' fill='%2318181c'/%3E%3Ccircle cx='16' cy='16' r='8' fill='%23e62d28'/%3E%3C/svg%3E"
)
HEAD = f'<link rel="icon" href="{ICON}">'


@dataclass
class Result:
    """What shows a finished video, in the order in which `Actions.make` fills it."""

    video: gr.Video
    picture: gr.Image
    lines: gr.HTML
    downloads: gr.Row
    video_file: gr.DownloadButton
    sidecar: gr.DownloadButton
    sheet_file: gr.DownloadButton
    sheet: gr.Image


def build_page(actions: Actions, own: Own) -> gr.Blocks:
    """Build the page.

    Args:
        actions: what its buttons do.
        own: what the first checkpoint makes if it is not told otherwise.
    """
    with gr.Blocks(title="stdit", analytics_enabled=False, delete_cache=(600, FILES_ARE_KEPT)) as page:
        gr.HTML(_header(actions.names), elem_id="header", padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                form, generate, cancel, random = _add_form(actions, own)
            with gr.Column(scale=6, min_width=300):
                result = _add_result()
        if DEMO in actions.names:
            _add_examples(actions, form)
        _connect(page, actions, form, result, generate, cancel, random)
    return page.queue(max_size=actions.limits.waiting, default_concurrency_limit=1, api_open=False)


def style() -> str:
    """Return the page's style sheet."""
    return resources.files("stdit_cli.commands.serve").joinpath("style.css").read_text(encoding="utf-8")


def theme() -> gr.themes.ThemeClass:
    """Return the page's theme: fonts of the system alone, so that none is loaded from elsewhere."""
    fonts, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    return gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", radius_size="lg", font=fonts, font_mono=mono)


def _header(names: list[str]) -> str:
    model = " Made by the bundled demo model, which knows coloured shapes." if names == [DEMO] else ""
    return f"<h1>stdit</h1><p>Videos from text.{model}</p>"


def _add_form(actions: Actions, own: Own) -> tuple[Form, gr.Button, gr.Button, gr.Button]:
    """Add the fields, in a `Form` that holds them in place of values, and the buttons."""
    length, field = actions.limits.prompt, numbers(own, actions.limits)
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="a red circle moving left" if actions.names[0] == DEMO else "Describe the video in English",
        lines=2,
        max_lines=6,
        max_length=length,
        autofocus=True,
        submit_btn=False,
        elem_id="prompt",
    )
    with gr.Row(elem_id="buttons"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate")
        cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
    checkpoint = gr.Dropdown(
        actions.names,
        value=actions.names[0],
        label="Checkpoint",
        filterable=False,
        visible=len(actions.names) > 1,
        elem_id="checkpoint",
    )
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        negative = gr.Textbox(
            label="Negative prompt",
            placeholder="What guidance moves away from",
            max_length=length,
            elem_id="negative",
        )
        with gr.Row(elem_id="seed-row"):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SAFE_SEED, min_width=140, elem_id="seed")
            random = gr.Button("Random seed", size="sm", min_width=120, elem_id="random")
        steps = gr.Slider(label="Steps", elem_id="steps", **field["steps"])
        guidance = gr.Slider(label="Guidance", elem_id="guidance", **field["guidance"])
        frames = gr.Slider(label="Frames", elem_id="frames", **field["frames"])
        with gr.Row():
            height = gr.Slider(label="Height", min_width=140, elem_id="height", **field["height"])
            width = gr.Slider(label="Width", min_width=140, elem_id="width", **field["width"])
    with gr.Accordion("Start from an image", open=False, elem_id="start"):
        image = gr.Image(
            type="filepath",
            sources=["upload", "clipboard"],
            image_mode=None,
            height=200,
            show_label=False,
            buttons=[],
            elem_id="image",
        )
    form = Form(prompt, negative, checkpoint, image, seed, steps, guidance, frames, height, width)
    return form, generate, cancel, random


def _add_result() -> Result:
    fixed: dict[str, Any] = {"interactive": False, "buttons": []}
    video = gr.Video(label="Video", autoplay=True, loop=True, height=400, elem_id="video", **fixed)
    picture = gr.Image(label="Picture", visible=False, height=400, elem_id="picture", **fixed)
    lines = gr.HTML(visible=False, elem_id="lines", padding=False)
    with gr.Row(visible=False, elem_id="downloads") as downloads:
        video_file, sidecar, sheet_file = (
            gr.DownloadButton(f"↓ {label}", size="sm", min_width=90, elem_id=f"get-{name}")
            for name, label in (("video", "Video"), ("sidecar", "JSON"), ("sheet", "Contact sheet"))
        )
    sheet = gr.Image(show_label=False, visible=False, elem_id="sheet", **fixed)
    return Result(video, picture, lines, downloads, video_file, sidecar, sheet_file, sheet)


def _add_examples(actions: Actions, form: Form) -> None:
    """Add videos of the demo, which fill in the form."""
    gr.HTML(
        "<h2>What the demo knows</h2><p>Made by the bundled demo model from these prompts, with seed 0. Choose one to "
        "fill in the form, then change its words.</p>",
        elem_id="examples-head",
        padding=False,
    )
    gallery = gr.Gallery(
        list(zip(example_files(), EXAMPLES, strict=True)),
        show_label=False,
        columns=8,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="examples",
    )
    fields = list(vars(form).values())
    gallery.select(actions.choose, None, fields, queue=False, show_progress="hidden", api_visibility="private")


def _connect(
    page: gr.Blocks,
    actions: Actions,
    form: Form,
    result: Result,
    generate: gr.Button,
    cancel: gr.Button,
    random: gr.Button,
) -> None:
    """Connect the buttons to their actions."""
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    one_at_a_time: dict[str, Any] = {
        "preprocess": False,  # `Form` checks the values as they arrive
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "api_visibility": "private",
    }
    buttons = [generate, cancel]
    start = gr.on([generate.click, form.prompt.submit], lambda: on_buttons(busy=True), None, buttons, **at_once)
    run = start.then(
        actions.make,
        list(vars(form).values()),
        list(vars(result).values()),
        show_progress_on=[result.video],
        scroll_to_output=True,
        **one_at_a_time,
    )
    for ended in (run.success, run.failure):
        ended(lambda: on_buttons(busy=False), None, buttons, **at_once)
    cancel.click(actions.stop, None, buttons, cancels=[run], **at_once)
    page.unload(actions.leave)
    random.click(None, None, form.seed, js="() => Math.floor(Math.random() * 2 ** 31)", api_visibility="private")
    form.checkpoint.input(
        actions.change,
        form.checkpoint,
        [form.steps, form.guidance, form.frames, form.height, form.width],
        show_progress_on=[form.checkpoint],
        **one_at_a_time,
    )
