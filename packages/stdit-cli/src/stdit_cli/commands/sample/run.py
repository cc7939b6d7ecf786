"""Carry out a request of `stdit sample`: load, warn, generate, write."""

import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.outputs import check_out, format_remarks, plan_jobs, sidecar_path, unique_path
from stdit_cli.commands.sample.request import Job, SampleRequest
from stdit_cli.console import CountingBar, ended_by_signal
from stdit_train.distributed.world import World

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others
SHEET_ROWS = 24  # videos on a contact sheet at most
SHEET_COLUMNS = 8  # frames of each


def run_sampling(request: SampleRequest) -> None:
    """Make the videos batch by batch; each is written when it is done, so that it survives an interruption."""
    started = time.perf_counter()
    world = World.from_env()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    check_out(request)
    if request.settings.checkpoint == "demo" and world.is_main:
        console.print("using the bundled demo model (shapes, 16 frames of 64x64); choose another with --checkpoint")

    from stdit_cli.commands.sample.checks import check_request
    from stdit_train.assets import resolve_source
    from stdit_train.pipeline.find import find_checkpoint

    source = find_checkpoint(resolve_source(request.settings.checkpoint))
    kind = check_request(request, source)

    from stdit_cli.commands.sample.generate import VideoGenerator, load, remarks
    from stdit_data.video.write import export_video

    world.select_gpu()
    generator = VideoGenerator(request, source, load(request.settings, source))
    jobs = plan_jobs(request, kind)
    sha256 = generator.weights_sha256()
    settings, used = generator.record()
    lines = [
        *format_remarks(kind, *generator.size, generator.fps),
        *remarks(generator, jobs),
        *differences(request, generator, sha256, used),
    ]
    for line in lines if world.is_main else ():
        console.print(line)

    weights = {"source": settings.checkpoint, "sha256": sha256}
    mine = list(batches(share_of(jobs, world), request))
    count = sum(len(batch) for batch, _ in mine) if request.recorded is None else 1
    finished: list[tuple[str, str, Any]] = []
    try:
        with ended_by_signal(), CountingBar(console, "steps", disable=not world.is_main) as bar:
            task = bar.add_task("sampling", total=None)

            def advance(pipeline: Any, _index: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                bar.update(task, advance=1, total=len(mine) * pipeline.num_timesteps)
                return kwargs

            for batch, wanted in mine:
                videos = generator.make(batch, advance)
                for i in wanted:
                    path = unique_path(batch[i].path, request.overwrite)
                    export_video(videos[i], path, generator.fps)
                    content = sidecar.build(settings, batch, i, weights, used, str(generator.pipeline.device))
                    sidecar.write(sidecar_path(path), content)
                    finished.append((batch[i].prompt, f"seed {batch[i].seed}, {path.name}", thumbnails(videos[i])))
                    console.print(f"{path}")
    except KeyboardInterrupt:
        console.print(f"{len(finished)} of {count} videos were finished, and are kept")
        raise
    everything = gather(finished, world)
    if everything is not None:
        if len(everything) > 1:
            write_sheet(console, jobs[0].path.parent / "contact-sheet.png", request.overwrite, everything)
        seconds = time.perf_counter() - started
        console.print(f"{len(everything)} video{'s' * (len(everything) > 1)} in {seconds:.1f} s")


def share_of(items: list[T], world: World) -> list[T]:
    """Return every `world.size`-th item, so that shares differ by one at most."""
    return items[world.rank :: world.size]


def gather(items: list[T], world: World) -> list[T] | None:
    """Return the items of all processes on rank 0, in the order from before `share_of`; None on the others."""
    with world.connect(PATIENCE):
        shares = world.gather(items)
    return None if shares is None else in_order(shares)


def in_order(shares: list[list[T]]) -> list[T]:
    """Return the items of all shares in the order from before `share_of`."""
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def batches(jobs: list[Job], request: SampleRequest) -> Iterator[tuple[list[Job], list[int]]]:
    """Yield jobs to make together, and which of them to write: all, or for a recorded video that one alone.

    What is made together either has negative prompts or has none.
    """
    if request.recorded is not None and jobs:
        together, index = request.recorded["batch"]["videos"], request.recorded["batch"]["index"]
        yield [Job(video["prompt"], video["negative"], video["seed"], jobs[0].path) for video in together], [index]
        return
    for _, group in groupby(jobs, key=lambda job: job.negative is None):
        alike = list(group)
        for start in range(0, len(alike), request.batch):
            batch = alike[start : start + request.batch]
            yield batch, list(range(len(batch)))


def differences(request: SampleRequest, generator: Any, sha256: str, used: dict[str, Any]) -> Iterator[str]:
    """Return a warning for each reason why a recorded video will not come out the same."""
    recorded = request.recorded
    if recorded is None:
        return
    for name in ("image", "video"):
        key = f"{name}_sha256"
        if recorded["used"].get(key) != used.get(key):
            yield f"warning: the {name} that it starts from has changed since; the video will differ"
    if recorded["used"].get("lora_sha256") != used.get("lora_sha256"):
        yield "warning: an adapter has changed since; the video will differ"
    if recorded["checkpoint"]["sha256"] != sha256:
        yield "warning: this checkpoint has other weights than the video was made with; it will differ"
    device = str(generator.pipeline.device)
    if recorded["made_on"]["device"] != device:
        yield f"warning: made on {recorded['made_on']['device']}, now on {device}; it will differ a little"
    import torch

    then, now = recorded["versions"].get("torch"), torch.__version__
    if then != now:
        yield f"warning: made with torch {then}, now {now}; it may differ a little"


def thumbnails(video: Any) -> Any:
    """Return the frames of a video [3, T, H, W] that its row on a contact sheet shows."""
    import torch

    frames = video.shape[1]
    return video[:, torch.linspace(0, frames - 1, min(frames, SHEET_COLUMNS)).round().long()]


def write_sheet(console: Console, path: Path, overwrite: bool, videos: list[tuple[str, str, Any]]) -> None:
    """Draw the finished videos with prompt, seed and file name, at most `SHEET_ROWS` of them."""
    from stdit_data.preview import contact_sheet
    from stdit_data.storage.atomic import open_write

    prompts, details, shown = zip(*videos[:SHEET_ROWS], strict=True)
    sheet = unique_path(path, overwrite)
    with open_write(str(sheet)) as file:
        contact_sheet(shown, prompts, details=details, columns=SHEET_COLUMNS).save(file, "PNG")
    rest = f" (the first {SHEET_ROWS} of {len(videos)} videos)" if len(videos) > SHEET_ROWS else ""
    console.print(f"{sheet}{rest}")
