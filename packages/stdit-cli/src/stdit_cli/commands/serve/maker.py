"""Makes the videos of the page: one at a time, with one checkpoint loaded at a time."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from typing import Any

from torch import Tensor

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.checks import check_request
from stdit_cli.commands.sample.generate import VideoGenerator, load, remarks
from stdit_cli.commands.sample.outputs import format_remarks, plan_jobs, sidecar_path
from stdit_cli.commands.sample.request import Job, SampleRequest, Settings
from stdit_cli.commands.sample.run import SHEET_COLUMNS, thumbnails
from stdit_cli.commands.serve.limits import Own
from stdit_data.preview import contact_sheet
from stdit_data.video.write import export_video
from stdit_model import STDiTPipeline
from stdit_train.pipeline.find import CheckpointSource


class Stopped(Exception):
    """The video was cancelled, nobody waits for it any more, or the server ends."""


@dataclass(frozen=True)
class Made:
    """A finished video: its files, and lines on it."""

    video: Path
    sidecar: Path
    sheet: Path
    lines: list[str]


class Maker:
    """Makes videos.

    Args:
        sources: the checkpoints by the names that the page offers them under.
        settings: how to load them.
        folder: for the files; each video's are in a folder of their own with a name that cannot be guessed.
    """

    def __init__(self, sources: dict[str, CheckpointSource], settings: Settings, folder: Path) -> None:
        self.sources, self.settings, self.folder = sources, settings, folder
        self._busy = Lock()
        self._ended = Event()
        self._loaded: tuple[str, STDiTPipeline] | None = None
        self._own: dict[str, Own] = {}
        self._sha256: dict[str, str] = {}

    def own(self, name: str, stop: Event | None = None) -> Own:
        """Return what a checkpoint makes if it is not told otherwise; loads it.

        Raises:
            Stopped: `stop` was set, or `end` called, before it was loaded.
            ConfigError, WeightsError: it cannot be loaded.
        """
        if name not in self._own:
            with self._busy:
                self._check(stop)
                config = self._load(name).config
            clip = config.num_frames, config.height, config.width
            self._own[name] = Own(*clip, config.num_inference_steps, float(config.guidance_scale))
        return self._own[name]

    def make(self, request: SampleRequest, on_step: Callable[[int, int], None], stop: Event) -> Made:
        """Make the video of a request, write its files as `stdit sample` does, and a contact sheet of it.

        The sidecar names the checkpoint as the page does and the picture by its name alone: it tells nobody where
        they are on this machine.

        Args:
            request: for one video; its checkpoint is one of the names.
            on_step: called with the number of steps that are done and their total.
            stop: ends the work before the next step once it is set.

        Raises:
            Stopped: it was set, or `end` called.
            ConfigError, DataError, WeightsError: a picture that cannot be read, settings that do not fit the
                checkpoint, or not enough memory.
        """
        started = perf_counter()
        name = request.settings.checkpoint
        source = self.sources[name]
        kind = check_request(request, source)
        out = self.folder / secrets.token_hex(16)
        [job] = plan_jobs(replace(request, out=out), kind)
        done = 0

        def advance(pipeline: Any, _index: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            on_step(done, pipeline.num_timesteps)
            self._check(stop)
            return kwargs

        with self._busy:  # until the files are written, see `wait`
            self._check(stop)
            generator = VideoGenerator(request, source, self._load(name))
            if name not in self._sha256:
                self._sha256[name] = generator.weights_sha256()
            lines = [*format_remarks(kind, *generator.size, generator.fps), *remarks(generator, [job])]
            self._check(stop)
            [video] = generator.make([job], advance)
            self._check(stop)
            sheet = self._write(generator, job, video)
        size = f"{generator.size[1]}×{generator.size[0]} pixels"
        frames = f"{generator.frames} frames" if generator.frames > 1 else "one frame"
        seconds = perf_counter() - started
        summary = f"{frames} of {size}, seed {job.seed}, {generator.settings.steps} steps, {seconds:.1f} s"
        return Made(job.path, sidecar_path(job.path), sheet, [summary, *lines])

    def end(self) -> None:
        """Stop what is made before its next step, and make nothing more; returns at once, see `wait`."""
        self._ended.set()

    def wait(self) -> None:
        """Wait until nothing is loaded, made or written any more, after `end`."""
        with self._busy:
            pass

    def _write(self, generator: VideoGenerator, job: Job, video: Tensor) -> Path:
        """Write a video [3, T, H, W], its sidecar and its contact sheet; returns the path of the sheet."""
        settings, used = generator.record()
        name = generator.settings.checkpoint
        image = settings.image and Path(settings.image).name
        settings = replace(settings, checkpoint=name, vae=self.settings.vae, image=image)
        settings = replace(settings, text_encoder=self.settings.text_encoder)
        weights = {"source": name, "sha256": self._sha256[name]}
        job.path.parent.mkdir()
        export_video(video, job.path, generator.fps)
        content = sidecar.build(settings, [job], 0, weights, used, str(generator.pipeline.device))
        sidecar.write(sidecar_path(job.path), content)
        sheet = job.path.parent / "contact-sheet.png"
        details = [f"seed {job.seed}, {job.path.name}"]
        contact_sheet([thumbnails(video)], [job.prompt], details=details, columns=SHEET_COLUMNS).save(sheet)
        return sheet

    def _load(self, name: str) -> STDiTPipeline:
        """Return a checkpoint's pipeline; the one before is dropped first, so that they are never both in memory."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            self._loaded = name, load(replace(self.settings, checkpoint=name), self.sources[name])
        return self._loaded[1]

    def _check(self, stop: Event | None) -> None:
        if self._ended.is_set() or (stop is not None and stop.is_set()):
            raise Stopped
