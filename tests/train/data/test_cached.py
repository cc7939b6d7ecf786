"""Training from a cache of latents and texts: equal to clips, resumed to the bit, refused when it doesn't fit."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_data.video.write import write_mp4
from stdit_model import STDiTPipeline, video_vae
from stdit_train.build import build_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components import load as components_load
from stdit_train.components.load import load_text_encoder
from stdit_train.components.precompute import Encoding, decode_entries, open_jobs
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.resolve import resolve_config
from stdit_train.config.schema import TrainConfig
from stdit_train.demo.text import build_text_encoder
from stdit_train.distributed.world import World
from stdit_train.estimate.training import estimate_run
from stdit_train.task import STDiTTask
from stdit_train.trainer import Trainer

NAMES = {"vae": "the vae", "text_encoder": "the text encoder"}


class Silent:
    """A watcher that remembers losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stop_at: int | None = None

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        self.losses.append(values["loss"])
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return from_dict(set_values(to_dict(config), {key.replace("__", "."): value for key, value in values.items()}))


def encode(config: TrainConfig, out: Path, **settings: Any) -> str:
    for job in open_jobs(config, NAMES, Encoding(out=str(out), **settings), World()):
        assert job.run()
    return str(out)


def start(config: TrainConfig, folder: Path) -> tuple[Trainer, Silent]:
    run, watcher = RunFolder(folder), Silent()
    if not run.config_file.exists():
        run.create(config)
    return build_trainer(config, run, watcher), watcher


def trained(config: TrainConfig, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainer, watcher = start(config, folder)
    trainer.train()
    return trainer.model.state_dict(), watcher.losses


def test_a_cache_trains_as_clips_do(small: TrainConfig, tmp_path: Path) -> None:
    """To the bit: with the texts in float32, and latents in bfloat16 as clips are remembered too."""
    cache = encode(small, tmp_path / "cache", dtype="float32")
    halves = encode(small, tmp_path / "halves")
    clips, losses = trained(replace(small, global_batch=5), tmp_path / "clips")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "video").symlink_to(Path(halves) / "video")
    (mixed / "text").symlink_to(Path(cache) / "text")
    config = changed(small, global_batch=5, data__source=str(mixed), data__cache_latents=False)
    weights, cached_losses = trained(config, tmp_path / "cached")
    assert cached_losses == losses
    for name, value in clips.items():
        assert torch.equal(value, weights[name]), name


def test_in_bfloat16_it_is_close(small: TrainConfig, tmp_path: Path) -> None:
    plain = changed(small, optimizer__name="adamw", optimizer__lr=1e-6)
    cache = encode(plain, tmp_path / "cache")
    pixels = trained(changed(plain, data__cache_latents=False), tmp_path / "pixels")[1]
    cached = trained(changed(plain, data__cache_latents=False, data__source=cache), tmp_path / "cached")[1]
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(pixels), rtol=1e-3, atol=0)


def test_videos_read_without_randomness_train_as_their_cache_does(small: TrainConfig, tmp_path: Path) -> None:
    """Files are decoded and encoded in every epoch; in float32 only the VAE's batch size rounds differently."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(6):
        clip = ShapesDataset(frames=12, height=32, width=32, length=6).load(index)
        write_mp4(folder / f"{index}.mp4", clip.video, 8.0)
        (folder / f"{index}.txt").write_text(clip.caption)
    settings = {"data__source": str(folder), "data__place": "center", "data__cache_latents": False}
    clips = changed(small, **settings, optimizer__name="adamw", global_batch=3)
    losses = trained(clips, tmp_path / "clips")[1]
    cache = encode(clips, tmp_path / "cache", dtype="float32")
    cached = trained(changed(clips, data__source=cache), tmp_path / "cached")[1]
    assert len(set(losses)) == len(losses) == 6
    torch.testing.assert_close(cached, losses, rtol=1e-5, atol=0)


def test_resuming_on_a_cache_is_exact(small: TrainConfig, tmp_path: Path) -> None:
    """With a window narrower than the cache: ten clips in five shards."""
    cache = encode(small, tmp_path / "cache", shard_bytes=2 * 2 * 4 * 4 * 2 * 2 * 2 + 1)
    assert LatentDataset(cache).metadata["shards"] == 5
    config = changed(small, data__source=cache, data__cache_latents=False, data__window=2, steps=8)
    whole, losses = trained(config, tmp_path / "whole")
    first, first_watcher = start(config, tmp_path / "parts")
    first_watcher.stop_at = 5  # in the second epoch
    assert not first.train().finished
    second, second_watcher = start(config, tmp_path / "parts")
    second.resume(RunFolder(tmp_path / "parts").latest_checkpoint())
    second.train()
    assert first_watcher.losses + second_watcher.losses == losses
    for name, value in whole.items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def other_parts(parts: Path, folder: Path) -> Path:
    """The parts once more, to be changed."""
    shutil.copytree(parts, folder)
    return folder


def test_another_vae_scale_or_encoder_is_refused_by_name(small: TrainConfig, parts: Path, tmp_path: Path) -> None:
    cache = encode(small, tmp_path / "cache")
    config = changed(small, data__source=cache, data__cache_latents=False)

    folder = other_parts(parts, tmp_path / "a")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=0.3)
    vae.save_pretrained(folder / "vae")
    with pytest.raises(
        ConfigError, match=r"encoded with the VAE the vae \(scale .*1.0.*\), this run has .*a \(scale .*0.3"
    ):
        start(changed(config, data__vae=str(folder)), tmp_path / "run1")

    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.01)
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(folder / "vae")
    with pytest.raises(
        ConfigError, match=r"encoded with the VAE the vae \(hash \w{16}\), this run has .*leave --vae out"
    ):
        start(changed(config, data__vae=str(folder)), tmp_path / "run2")

    build_text_encoder(34, width=32, seed=1).save_pretrained(folder / "text_encoder")
    with pytest.raises(ConfigError, match=r"with the text encoder the text encoder \(hash .*leave --text-encoder out"):
        start(changed(config, data__text_encoder=str(folder)), tmp_path / "run3")

    start(changed(config, data__vae=str(other_parts(parts, tmp_path / "b"))), tmp_path / "run4")  # a copy is the same


def test_another_shape_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    cache = encode(small, tmp_path / "cache")
    config = changed(small, data__source=cache, data__cache_latents=False)
    with pytest.raises(
        ConfigError, match=r"holds clips of 4x16x16, stage demo trains on 4x32x16: encode again with"
    ) as error:
        start(changed(config, data__height=32), tmp_path / "run")
    assert str(error.value).endswith("or train with --set data.frames=4 --set data.height=16 --set data.width=16")
    with pytest.raises(ConfigError, match=r"texts of up to 16 tokens, the run's model.model_max_length is 20"):
        start(changed(config, model__model_max_length=20), tmp_path / "run")


def test_the_parts_of_a_run_are_those_of_its_cache(small: TrainConfig, tmp_path: Path) -> None:
    cache = encode(small, tmp_path / "cache")
    config = changed(small, data__source=cache, data__vae="other", data__text_encoder="other")
    found = resolve_config(config, {"data.text_encoder": "other"})
    assert (found.data.vae, found.data.text_encoder, found.data.cache_latents) == ("the vae", "other", False)


def test_latents_alone_train_with_a_live_text_encoder(small: TrainConfig, tmp_path: Path) -> None:
    cache = encode(small, tmp_path / "cache", parts=("video",))
    expected = trained(small, tmp_path / "clips")[1]
    config = changed(small, data__source=cache, data__cache_latents=False)
    assert trained(config, tmp_path / "cached")[1] == expected


def test_the_text_encoder_is_not_loaded(
    small: TrainConfig, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, validation, samples and the pipeline that is left behind: all without it, as with it."""
    small = changed(small, validate_every=3, sample_every=3)
    losses = trained(changed(small, data__cache_latents=False), tmp_path / "clips")[1]
    cache = encode(small, tmp_path / "cache", dtype="float32")
    config = changed(small, data__source=cache, data__cache_latents=False)

    real = load_text_encoder
    loaded: list[str] = []
    monkeypatch.setattr(components_load, "load_text_encoder", lambda *given: loaded.append(given[0]) or real(*given))
    trainer, watcher = start(config, tmp_path / "named")  # validation's captions are not in the cache
    assert loaded == [str(parts)]
    assert isinstance(trainer.task, STDiTTask)
    assert (trainer.task.components.text_encoder, trainer.task.components.tokenizer) == (None, None)
    trainer.train()
    torch.testing.assert_close(watcher.losses, losses, rtol=1e-5, atol=0)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("clips", "named")]
    mine, theirs = ([json.loads(line) for line in some if "validation_loss" in line] for some in lines)
    assert len(mine) == 2
    for a, b in zip(mine, theirs, strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-4)
    for run in ("clips", "named"):
        made = STDiTPipeline.from_pretrained(tmp_path / run / "pipeline")
        video = made("a red circle", generator=torch.Generator().manual_seed(0)).frames
        assert video.shape == (1, 3, 4, 16, 16)
    assert estimate_run(config).memory["VAE and text encoder"] < estimate_run(small).memory["VAE and text encoder"]


def test_not_even_looked_at_when_nothing_names_another(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor need it be on this machine: the pipeline then has it by name."""
    cache = encode(small, tmp_path / "cache")
    about = tmp_path / "cache" / "video" / "about.json"  # as if made of videos: no validation
    about.write_text(about.read_text().replace('"source": "shapes"', '"source": "videos"'))
    config = changed(small, data__source=cache, data__cache_latents=False, data__text_encoder=NAMES["text_encoder"])
    monkeypatch.setattr(components_load, "load_text_encoder", None)
    trained(config, tmp_path / "run")
    assert list((tmp_path / "run" / "samples").glob("*.mp4"))
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["_hub_components"] == {"text_encoder": "the text encoder", "tokenizer": "the text encoder"}
    assert index["text_encoder"] == [None, None]


def test_a_temporal_vae(small: TrainConfig, parts: Path, tmp_path: Path) -> None:
    """CogVideoX's: 9 frames become 3, by its own strides; encoded, decoded, trained on."""
    torch.manual_seed(0)
    folder = other_parts(parts, tmp_path / "parts")
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    config = changed(small, data__frames=9, data__vae=str(folder))
    cache = encode(config, tmp_path / "cache")
    dataset = LatentDataset(cache)
    assert list(dataset.buckets.values()) == [(3, 4, 4)]
    clip = dataset.load(0, seed=0, epoch=0)
    assert clip.video.shape == (8, 3, 4, 4)
    videos, lines = decode_entries(cache, str(folder), 2, seed=0)
    assert [tuple(video.shape) for video in videos] == [(3, 9, 16, 16)] * 2
    assert "tokens" in lines[0]
    expected = video_vae.encode_moments(vae, ShapesDataset(frames=9, height=16, width=16).load(0).video[None])
    assert torch.equal(clip.video, expected[0].bfloat16())
    losses = trained(changed(config, data__source=cache, data__cache_latents=False, steps=2), tmp_path / "run")[1]
    assert len(losses) == 2


def test_offloaded_text_encoders_give_the_same(
    small: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = LatentDataset(encode(small, tmp_path / "plain"))
    offloaded = LatentDataset(
        encode(
            small,
            tmp_path / "offloaded",
            text_loading="offload",
            text_memory="40KB",
            offload_folder=tmp_path / "disk",
        )
    )
    assert "offloaded to the disk" in caplog.text  # it did not all fit
    assert plain.text_metadata == offloaded.text_metadata
    for index in range(len(plain)):
        assert torch.equal(plain.load(index, seed=0, epoch=0).text, offloaded.load(index, seed=0, epoch=0).text)
