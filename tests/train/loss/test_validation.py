"""The validation loss of runs on videos: clips that are never trained on, the same ones always."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.datasets.videos import VideoDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.latents.dataset import LatentDataset
from stdit_data.video.write import write_mp4
from stdit_train.build import build_trainer, open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import open_components
from stdit_train.components.precompute import Encoding, open_jobs
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets
from stdit_train.data.holdout import VALIDATION_CLIPS, ValidationClips, validation_captions
from stdit_train.distributed.world import World
from stdit_train.loss.validation import validation_batches
from stdit_train.tracking.metrics import read_metrics

RESAMPLING_SHARE = 0.6


def write_clips(folder: Path, indices: Iterable[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for index in indices:
        clip = ShapesDataset(frames=12, height=32, width=32, length=100).load(index)
        write_mp4(folder / f"{index:03d}.mp4", clip.video, 8.0)
        (folder / f"{index:03d}.txt").write_text(clip.caption)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("sets") / "clips", range(10))


@pytest.fixture
def videos(small: TrainConfig, clips: Path) -> TrainConfig:
    return changed(small, data__source=str(clips), data__cache_latents=False, data__validation=RESAMPLING_SHARE)


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return from_dict(set_values(to_dict(config), {key.replace("__", "."): value for key, value in values.items()}))


def encode(config: TrainConfig, out: Path, **settings: Any) -> str:
    names = {"vae": config.data.vae, "text_encoder": config.data.text_encoder}
    for job in open_jobs(config, names, Encoding(out=str(out), **settings), World()):
        assert job.run()
    return str(out)


def train(config: TrainConfig, folder: Path) -> tuple[list[float], list[str]]:
    """The validation losses of a run, and the lines of its log."""
    run = RunFolder(folder)
    open_trainer(config, config, run, NullCallback()).train()
    rows = read_metrics(run.metrics_file)
    return [row["validation_loss"] for row in rows if "validation_loss" in row], run.log_file.read_text().splitlines()


def sides(config: TrainConfig) -> tuple[set[str], list[str]]:
    """The file names that are trained on, and those validated on in order."""
    dataset, validation, _ = build_datasets(config)
    assert isinstance(dataset, (VideoDataset, LatentDataset))
    assert isinstance(validation, ValidationClips)
    held = [validation.dataset.path(index) for index in range(len(validation))]
    return {Path(dataset.path(i)).name for i in range(len(dataset))}, [Path(path).name for path in held]


def test_a_share_is_held_out_and_stays_so_when_clips_are_added(videos: TrainConfig, tmp_path: Path) -> None:
    kept, held = sides(videos)
    assert kept | set(held) == {f"{i:03d}.mp4" for i in range(10)}
    assert 0 < len(held) < 10
    assert not kept & set(held)
    more = write_clips(tmp_path / "clips", range(20))  # the same folder name, elsewhere
    kept_then, held_then = sides(changed(videos, data__source=str(more)))
    assert kept <= kept_then
    assert [name for name in held_then if name in set(held)] == held


def test_a_group_is_held_out_as_a_whole(videos: TrainConfig, clips: Path, tmp_path: Path) -> None:
    (one, *_), kept = sides(videos)[1], sorted(sides(videos)[0])
    rows = [f"{clips / name},a,{'copies' if name in (one, kept[0]) else ''}" for name in (*kept, one)]
    (tmp_path / "grouped.csv").write_text("\n".join(["path,caption,group", *rows]))
    grouped = changed(videos, data__source=str(tmp_path / "grouped.csv"))
    assert sides(grouped) == (set(kept[1:]), [kept[0], one])
    cache = encode(grouped, tmp_path / "cache")
    assert sides(changed(grouped, data__source=cache)) == sides(grouped)


def test_a_cache_holds_out_the_same_clips(videos: TrainConfig, tmp_path: Path) -> None:
    cache = encode(videos, tmp_path / "cache", shard_bytes=4096)
    assert len(LatentDataset(cache)) == 10  # all are encoded, whatever is held out then
    assert sides(changed(videos, data__source=cache)) == sides(videos)


def test_the_loss_is_that_of_the_held_out_clips(videos: TrainConfig, tmp_path: Path) -> None:
    """Plainly opened: the middle, unmirrored. A cache of such clips has the same loss, as float32 rounds."""
    plain = changed(videos, data__place="center", optimizer__name="adamw", optimizer__lr=1e-9, data__flip=False)
    (losses, lines) = train(plain, tmp_path / "videos")
    assert len(losses) == 1
    held = sides(plain)[1]
    assert any(line.endswith(f"validation: {len(held)} held-out clips") for line in lines)
    cache = encode(plain, tmp_path / "cache", dtype="float32")
    torch.testing.assert_close(
        train(changed(plain, data__source=cache), tmp_path / "cached")[0], losses, rtol=1e-5, atol=0
    )
    drawn = changed(plain, data__place="random", data__crop="random", data__flip=True)
    torch.testing.assert_close(train(drawn, tmp_path / "drawn")[0], losses, rtol=1e-5, atol=0)


def test_without_held_out_clips_it_is_said(videos: TrainConfig, tmp_path: Path) -> None:
    losses, lines = train(changed(videos, data__validation=0.0, steps=1), tmp_path / "run")
    assert losses == []
    assert any("no validation set (e.g. --set data.validation=" in line for line in lines)


def test_another_folder_to_validate_on(videos: TrainConfig, clips: Path, tmp_path: Path) -> None:
    other = write_clips(tmp_path / "other", range(40, 43))
    config = changed(videos, data__validation=0.0, data__validation_source=str(other))
    kept, held = sides(config)
    assert len(kept) == 10
    assert held == ["040.mp4", "041.mp4", "042.mp4"]
    (losses, _) = train(config, tmp_path / "run")
    assert len(losses) == 1
    cache = encode(config, tmp_path / "cache")
    texts = len(LatentDataset(cache).texts.table())  # type: ignore[union-attr]
    assert texts <= 10
    cached = changed(config, data__source=cache)  # videos beside a cache: encoded here, captions as well
    dataset, validation, prompts = build_datasets(cached)
    assert isinstance(validation, ValidationClips)
    captions = [*prompts, *validation_captions(validation)]
    components = open_components(cached, dataset, captions, torch.device("cpu"))
    assert all(components.texts(caption).shape[1] == 32 for caption in validation.captions)  # type: ignore[misc]
    assert len(train(cached, tmp_path / "cached")[0]) == 1
    with pytest.raises(ConfigError, match=r"is a cache, .* is not"):
        build_datasets(changed(videos, data__validation=0.0, data__validation_source=cache))


def test_the_shape_is_the_runs_own(videos: TrainConfig) -> None:
    buckets = changed(videos, data__buckets=["4x16x32", "4x16x16"])  # the videos are square
    assert sides(buckets) == sides(videos)
    held = build_datasets(buckets)[1]
    assert isinstance(held, ValidationClips)
    assert held.bucket(0) == Bucket(4, 16, 16)
    with pytest.raises(ConfigError, match=r"none of the \d+ clips is of 8x8x8; set data.frames"):
        build_datasets(changed(videos, data__buckets=["4x16x16"], data__frames=8, data__height=8, data__width=8))


class Broken:
    """Clips of a number each, some of which can't be read."""

    def __init__(self, count: int, broken: set[int]) -> None:
        self.count, self.broken, self.read = count, broken, list[int]()

    def __len__(self) -> int:
        return self.count

    def bucket(self, index: int) -> Bucket:
        return Bucket(1, 1, 1)

    def caption(self, index: int) -> str:
        return str(index)

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        if index in self.broken:
            raise ClipError(f"{index}.mp4", "broken")
        self.read.append(index)
        return Clip(torch.full((3, 1, 1, 1), float(index)), str(index), index, 8.0)


def test_another_stands_in_for_a_clip_that_cannot_be_read() -> None:
    def used(count: int, broken: set[int]) -> list[int]:
        clips = ValidationClips(Broken(count, broken))  # type: ignore[arg-type]
        return [clips.load(i, seed=0, epoch=0).index for i in range(len(clips))]

    assert used(200, set()) == list(range(VALIDATION_CLIPS))
    assert used(200, {3}) == [0, 1, 2, 3 + VALIDATION_CLIPS, *range(4, VALIDATION_CLIPS)]
    assert used(200, {3, 3 + VALIDATION_CLIPS})[3] == 0
    assert used(5, {0, 1}) == [2, 2, 2, 3, 4]
    with pytest.raises(DataError, match=r"none of the 5 validation clips can be read, the last: 4\.mp4"):
        used(5, set(range(5)))


def test_a_short_set_repeats_and_ranks_share_it() -> None:
    class Rank(World):
        def __init__(self, rank: int) -> None:
            self.dp_rank, self.dp_size = rank, 2

    dataset = ValidationClips(Broken(4, set()))  # type: ignore[arg-type]
    for worlds in ([World()], [Rank(0), Rank(1)]):
        batches = [batch for world in worlds for batch in validation_batches(dataset, 8, world)]
        assert [index for indices, _, _ in batches for index in indices] == list(range(VALIDATION_CLIPS))
        assert [clip.index for _, clips, _ in batches for clip in clips] == [0, 1, 2, 3] * (VALIDATION_CLIPS // 4)
        levels = torch.cat([level for _, _, level in batches])
        torch.testing.assert_close(levels, (torch.arange(VALIDATION_CLIPS) + 0.5) / VALIDATION_CLIPS)


def test_a_run_does_not_go_on_with_another_share(videos: TrainConfig, tmp_path: Path) -> None:
    """It would train on what it was validated on."""
    train(videos, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    build_trainer(videos, run, NullCallback()).resume(checkpoint)
    with pytest.raises(ConfigError, match=r"loader state: samples is .*--init .*run starts one"):
        build_trainer(changed(videos, data__validation=0.1), run, NullCallback()).resume(checkpoint)


def test_wrong_settings_are_named(videos: TrainConfig, small: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation: of 10 clips none is held out at a share of 1e-06"):
        build_datasets(changed(videos, data__validation=1e-6))
    with pytest.raises(ConfigError, match="no videos are left to train on"):
        changed(videos, data__validation=1.0)
    with pytest.raises(ConfigError, match="set one"):
        changed(videos, data__validation_source="other")
    with pytest.raises(ConfigError, match="`shapes` has its own clips"):
        changed(small, data__validation=0.1)
    cache = encode(replace(small, data=replace(small.data, clips=2)), tmp_path / "cache")
    with pytest.raises(ConfigError, match="a cache of `shapes`"):
        build_datasets(changed(videos, data__source=cache))
    with pytest.raises(DataError, match="no such folder"):
        build_datasets(changed(videos, data__validation=0.0, data__validation_source=str(tmp_path / "nothing")))
