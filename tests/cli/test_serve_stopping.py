"""What Cancel, a closed page and the end of `stdit serve` stop, without its server and its model."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Event, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit_cli.commands.sample.generate import VideoGenerator
from stdit_cli.commands.sample.request import Settings
from stdit_cli.commands.serve import maker as making
from stdit_cli.commands.serve.actions import Actions
from stdit_cli.commands.serve.limits import Limits
from stdit_cli.commands.serve.maker import Maker
from stdit_train.assets import demo_folder
from stdit_train.pipeline.find import find_checkpoint

RED, BLUE = "a red circle moving left", "a blue circle moving left"
PATIENCE = 10  # seconds
STEPS = 3


class Page:
    """The actions of a page with two names of the demo, whose videos are made step by step as the test lets them.

    Attributes:
        starting: an item for each request once it can be cancelled.
        begun: the prompts whose videos were begun.
        step: released for each step that may be made.
        made: the prompts of all steps that were made.
        loaded: the names of the checkpoints in the order in which they were loaded.
    """

    def __init__(self, folder: Path) -> None:
        source = find_checkpoint(str(demo_folder()))
        self.folder = folder
        self.maker = Maker({"demo": source, "again": source}, Settings(), folder)
        self.actions = Actions(self.maker, Limits(None, None, None))
        self.starting, self.begun = Queue[str](), Queue[str]()
        self.step, self.made, self.loaded = Semaphore(0), list[str](), list[str]()
        self.pool = ThreadPoolExecutor()

    def ask(self, session: str, prompt: str, checkpoint: str = "demo") -> Future[list[Any]]:
        """Ask for a video as Gradio does, in a thread."""

        def progress(*_: Any, desc: str | None = None, **__: Any) -> None:
            if desc is not None:
                self.starting.put(desc)

        form = prompt, "", checkpoint, None, 0, STEPS, 1.7, 1, 64, 64
        return self.pool.submit(self.actions.make, asker(session), progress, *form)

    def make(self, prompt: str, on_step: Callable[..., Any]) -> list[Tensor]:
        self.begun.put(prompt)
        for index in range(STEPS):
            assert self.step.acquire(timeout=PATIENCE)
            self.made.append(prompt)
            on_step(SimpleNamespace(num_timesteps=STEPS), index, 0, {})
        return [torch.zeros(3, 1, 64, 64)]


def asker(session: str) -> Any:
    return SimpleNamespace(session_hash=session)


def is_stopped(asked: Future[list[Any]]) -> bool:
    """Tell whether the page shows nothing new once a request has ended."""
    return all(update == {"__type__": "update"} for update in asked.result(PATIENCE))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    page, load = Page(tmp_path), making.load

    def watched(settings: Settings, source: Any) -> Any:
        page.loaded.append(str(settings.checkpoint))
        return load(settings, source)

    monkeypatch.setattr(making, "load", watched)
    monkeypatch.setattr(VideoGenerator, "make", lambda _, jobs, on_step: page.make(jobs[0].prompt, on_step))
    with page.pool:
        yield page


@pytest.mark.parametrize("stop", ["stop", "leave"])
def test_the_next_video_is_begun_before_the_cancelled_one_has_ended_its_step(page: Page, stop: str) -> None:
    first = page.ask("tab", RED)
    assert page.begun.get(timeout=PATIENCE) == RED
    page.actions.stop(asker("tab"))
    second = page.ask("tab", BLUE)
    for _ in range(2):
        page.starting.get(timeout=PATIENCE)
    page.step.release()
    assert is_stopped(first)
    assert page.begun.get(timeout=PATIENCE) == BLUE
    getattr(page.actions, stop)(asker("tab"))
    page.step.release(STEPS)
    assert is_stopped(second)
    assert page.made == [RED, BLUE]
    assert list(page.folder.iterdir()) == []


def test_cancel_stops_the_videos_of_its_own_page_alone(page: Page) -> None:
    others = page.ask("another tab", RED)
    assert page.begun.get(timeout=PATIENCE) == RED
    page.actions.stop(asker("tab"))
    page.step.release(STEPS)
    assert not is_stopped(others)
    assert page.made == [RED] * STEPS


@pytest.mark.parametrize("stop", ["cancel", "end"])
def test_stopped_while_a_checkpoint_is_loaded(page: Page, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, going, load = Event(), Event(), making.load

    def slow(*arguments: Any) -> Any:
        loading.set()
        assert going.wait(PATIENCE)
        return load(*arguments)

    monkeypatch.setattr(making, "load", slow)
    page.step.release(2 * STEPS)
    first = page.ask("tab", RED)
    assert loading.wait(PATIENCE)
    if stop == "cancel":
        page.actions.stop(asker("tab"))
    else:
        page.maker.end()
    going.set()
    assert is_stopped(first)
    assert page.made == []


def test_what_waits_at_the_end_is_neither_loaded_nor_made(page: Page) -> None:
    first = page.ask("tab", RED)
    assert page.begun.get(timeout=PATIENCE) == RED
    second, third = page.ask("another tab", BLUE), page.ask("a third", BLUE, "again")
    page.maker.end()
    idle = page.pool.submit(page.maker.wait)
    assert not idle.done()
    page.step.release(3 * STEPS)
    idle.result(PATIENCE)
    assert list(map(is_stopped, (first, second, third, page.ask("tab", RED)))) == [True] * 4
    assert page.actions.change("again") == [{"__type__": "update"}] * 5
    assert (page.made, page.loaded) == ([RED], ["demo"])
    assert list(page.folder.iterdir()) == []


def test_nothing_is_written_for_who_cancels_during_the_decoding(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> list[Tensor]:
        page.actions.stop(asker("tab"))
        return [torch.zeros(3, 1, 64, 64)]

    monkeypatch.setattr(VideoGenerator, "make", decode)
    assert is_stopped(page.ask("tab", RED))
    assert list(page.folder.iterdir()) == []


def test_a_folder_that_was_removed_is_not_made_again(page: Page) -> None:
    asked = page.ask("tab", RED)
    assert page.begun.get(timeout=PATIENCE) == RED
    page.folder.rmdir()
    page.step.release(STEPS)
    with pytest.raises(FileNotFoundError):
        asked.result(PATIENCE)
    assert not page.folder.exists()
