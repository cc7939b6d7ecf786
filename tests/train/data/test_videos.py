"""Training on videos of one's own: every setting reaches the data, buckets train, wrong settings are named."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stdit_data.buckets import Bucket
from stdit_data.errors import ClipError, DataError
from stdit_data.loading.loader import ClipLoader
from stdit_data.video.write import write_mp4
from stdit_model import STDiTPipeline
from stdit_train.build import build_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, load_stage
from stdit_train.config.schema import DataConfig, TrainConfig
from stdit_train.data.datasets import build_datasets
from stdit_train.data.videos import loader_settings, open_clips


class Silent:
    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None: ...


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos (one wide, one of 5 frames) and two images, with captions."""
    folder = tmp_path_factory.mktemp("clips")
    for name, frames, size in (("a", 24, (32, 32)), ("b", 24, (32, 64)), ("c", 16, (32, 32)), ("short", 5, (32, 32))):
        t = torch.linspace(-1, 1, frames)[None, :, None, None]
        x = torch.linspace(-1, 1, size[1])[None, None, None, :]
        write_mp4(folder / f"{name}.mp4", (t + x).clamp(-1, 1).expand(3, frames, *size), fps=24)
    for name in ("p", "q"):
        Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / f"{name}.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a red circle, {path.stem}")
    return folder


def settings(clips: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"source": str(clips), "frames": 4, "height": 16, "width": 16, **values})


def test_the_interval_is_the_stages_or_open_soras(clips: Path) -> None:
    for frames, interval, expected in ((4, None, 3), (20, None, 2), (4, 5, 5)):
        (sampling,) = open_clips(settings(clips, frames=frames, interval=interval)).samplings.values()
        assert (sampling.interval, sampling.fps) == (expected, None)
    (sampling,) = open_clips(settings(clips, interval=3, target_fps=6.0)).samplings.values()
    assert (sampling.interval, sampling.fps) == (None, 6.0)
    assert open_clips(settings(clips, target_fps=6.0)).load(0, seed=0, epoch=0).fps == 6.0


def test_short_clips_are_left_out_or_held(clips: Path) -> None:
    with pytest.raises(ClipError, match="too short: 5 frames, 10 needed"):
        open_clips(settings(clips)).load(5, seed=0, epoch=0)
    held = open_clips(settings(clips, short="hold", flip=False)).load(5, seed=0, epoch=0).video
    assert torch.equal(held[:, 2], held[:, 3])


def test_a_run_keeps_pixels_as_uint8(clips: Path) -> None:
    config = replace(load_stage("demo"), data=settings(clips, short="hold", validation=0.3))
    train, validation, _ = build_datasets(config)
    assert validation is not None
    for dataset in (train, validation):
        assert dataset.load(0, seed=0, epoch=0).video.dtype == torch.uint8
    assert open_clips(config.data).load(0, seed=0, epoch=0).video.dtype == torch.float32


def test_place_and_crop(clips: Path) -> None:
    def drawn(**values: Any) -> int:
        dataset = open_clips(settings(clips, flip=False, **values))
        return len({dataset.load(1, seed=0, epoch=epoch).video.numpy().tobytes() for epoch in range(6)})

    assert drawn(place="start") == drawn(place="center") == 1
    assert drawn(place="random") > 1
    assert drawn(place="start", crop="random") > 1


def test_paths_out_of_the_root_are_refused_where_that_is_asked_for(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(f"path,caption\n{clips}/a.mp4,one\n")
    assert len(open_clips(settings(tmp_path / "set.csv"))) == 1
    with pytest.raises(DataError, match="leads out of"):
        open_clips(settings(tmp_path / "set.csv", confine=True))


def test_root_captions_and_stream(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("path,caption\na.mp4,\nb.mp4,two\n")
    source = str(tmp_path / "set.csv")
    with pytest.raises(DataError, match=r"1 of 2 clips have no caption, the first a\.mp4"):
        open_clips(settings(clips, source=source, root=str(clips)))
    config = load_stage("demo", {"data.source": source, "data.root": str(clips), "data.empty_captions": True})
    dataset, validation, prompts = build_datasets(config)
    assert (len(dataset), validation, prompts) == (2, None, ["two"])
    with pytest.raises(ClipError, match="no video stream 3"):
        open_clips(settings(clips, stream=3)).load(0, seed=0, epoch=0)


def test_batches_of_buckets(clips: Path) -> None:
    """`global_batch` for each, or what fits a budget: a multiple of 8 or of what is set, or its largest divisor."""
    names = ("4x16x16", "1x32x32", "4x16x32")
    config = replace(load_stage("demo"), data=settings(clips, buckets=names), global_batch=6, micro_batch=2)
    small, image, wide = Bucket(4, 16, 16), Bucket(1, 32, 32), Bucket(4, 16, 32)
    assert loader_settings(config)["global_batch"] == {small: 6, image: 6, wide: 6}
    assert loader_settings(config)["micro_batch"] == {small: 2, image: 2, wide: 1}  # as many tokens, at least one clip
    budget = replace(config, data=settings(clips, buckets=names, tokens=60))
    assert loader_settings(budget)["global_batch"] == {small: 8, image: 8, wide: 4}  # of 15, 15 and 7 that fit
    sixes = replace(config, data=settings(clips, buckets=names, tokens=60, batch_multiple=6))
    assert loader_settings(sixes)["global_batch"] == {small: 12, image: 12, wide: 6}
    twelves = replace(config, data=settings(clips, buckets=names, tokens=60, batch_multiple=12))
    assert loader_settings(twelves)["global_batch"] == {small: 12, image: 12, wide: 6}
    with pytest.raises(ConfigError, match=r"data.tokens: token budget 3: bucket 4x16x16 needs 4 tokens for a clip"):
        settings(clips, buckets=names, tokens=3)
    with pytest.raises(ConfigError, match="cache_latents keeps latents of one size"):
        open_clips(settings(clips, buckets=names, cache_latents=True))
    plain = loader_settings(replace(config, data=settings(clips, max_reject_share=0.5)))
    assert plain == {"global_batch": 6, "micro_batch": 2, "max_reject_share": 0.5}


@pytest.mark.parametrize("world", [1, 2])
def test_images_and_videos_in_one_run(clips: Path, world: int) -> None:
    data = settings(clips, buckets=("4x16x16", "1x16x16", "4x16x32"), tokens=16, flip=False)
    config = replace(load_stage("demo"), data=data)
    dataset = open_clips(data)
    kinds = {Path(dataset.path(index)).name: str(dataset.bucket(index)) for index in range(len(dataset))}
    assert kinds == {
        "a.mp4": "4x16x16",
        "b.mp4": "4x16x32",
        "c.mp4": "4x16x16",
        "p.png": "1x16x16",
        "q.png": "1x16x16",
        "short.mp4": "1x16x16",  # of 5 frames no 10 can be taken
    }
    loaders = [ClipLoader(dataset, **loader_settings(config), seed=0, rank=r, world_size=world) for r in range(world)]
    seen = set()
    for step in islice(zip(*loaders, strict=True), 8):
        batches = [batch for part in step for batch in part]
        (bucket,) = {batch.bucket for batch in batches}
        assert sum(len(batch.video) for batch in batches) == {"1x16x16": 16, "4x16x16": 4, "4x16x32": 2}[str(bucket)]
        seen.add(bucket)
    for loader in loaders:
        loader.close()
    assert len(seen) == 3


def test_a_run_on_buckets(small: TrainConfig, clips: Path, tmp_path: Path) -> None:
    """Trains on mixed shapes, and stopped half-way ends with the same weights."""
    data = replace(
        small.data,
        source=str(clips),
        cache_latents=False,
        buckets=("4x16x16", "1x16x16", "4x16x32"),
        tokens=8,
        max_reject_share=0.5,
    )
    steady = replace(small.optimizer, decay=0.0)  # else the rate would follow from the number of steps
    config = replace(small, data=data, micro_batch=1, steps=4, optimizer=steady)

    def run(name: str, steps: int) -> dict[str, torch.Tensor]:
        folder = RunFolder(tmp_path / name)
        trainer = build_trainer(replace(config, steps=steps), folder, Silent())
        folder.create(config)
        trainer.train()
        rows = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
        assert all(row["loss"] > 0 for row in rows if "loss" in row)
        return {key: value.clone() for key, value in trainer.model.state_dict().items()}

    whole, half = run("whole", 4), run("half", 2)
    assert any(not torch.equal(whole[key], half[key]) for key in whole)
    folder = RunFolder(tmp_path / "half")
    trainer = build_trainer(config, folder, Silent())
    checkpoint = folder.latest_checkpoint()
    assert checkpoint is not None
    trainer.resume(checkpoint)
    trainer.train()
    assert all(torch.equal(whole[key], value) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("cache_latents", [False, True])
def test_a_set_without_captions_samples_the_null_caption(
    small: TrainConfig, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_latents: bool
) -> None:
    shutil.copy(clips / "a.mp4", tmp_path / "a.mp4")
    data = replace(small.data, source=str(tmp_path), empty_captions=True, cache_latents=cache_latents)
    folder = RunFolder(tmp_path / "run")
    config = replace(small, data=data, global_batch=1, steps=2, sample_every=1)
    trainer = build_trainer(config, folder, Silent())
    folder.create(config)
    sampled, call = [], STDiTPipeline.__call__

    def recorded(self: STDiTPipeline, **inputs: Any) -> Any:
        sampled.append(inputs["prompt_embeds"].clone())
        return call(self, **inputs)

    monkeypatch.setattr(STDiTPipeline, "__call__", recorded)
    assert trainer.train().finished
    (first, last), null = sampled, trainer.model.null_caption(1, config.model.model_max_length)
    assert torch.equal(first, null)
    assert torch.equal(last, null)
    assert {path.name for path in folder.samples.glob("*.mp4")} == {"step-000001-0.mp4", "step-000002-0.mp4"}
    assert (folder.pipeline / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.interval": 0}, "data.interval: input should be greater than or equal to 1, not 0"),
        ({"data.interval": "often"}, "data.interval: input should be a valid integer"),
        ({"data.target_fps": 0}, "data.target_fps: input should be greater than 0, not 0"),
        ({"data.short": "loop"}, "data.short: input should be 'skip' or 'hold', not 'loop'"),
        ({"data.crop": "left"}, "data.crop: input should be 'center' or 'random', not 'left'"),
        ({"data.place": "end"}, "data.place: input should be 'random', 'start' or 'center', not 'end'"),
        ({"data.stream": -1}, "data.stream: input should be greater than or equal to 0, not -1"),
        ({"data.max_reject_share": 2}, "data.max_reject_share: input should be less than or equal to 1, not 2"),
        (
            {"data.source": "x", "data.buckets": ["16x256"]},
            "data.buckets: bucket '16x256': expected FRAMESxHEIGHTxWIDTH",
        ),
        ({"data.tokens": 100}, "data.tokens needs data.buckets: set these too"),
        ({"data.buckets": ["4x16x16"]}, "data.buckets are for videos"),
        ({"data.max_reject": 0.1}, "did you mean data.max_reject_share"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage("demo", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
