"""A stage on the latents of a released video VAE, with tiny ones of the same classes: cache, training, samples."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLAllegro, AutoencoderKLCogVideoX, AutoencoderKLWan
from PIL import Image

from stdit_data.latents.dataset import LatentDataset
from stdit_model.errors import SettingsError
from stdit_train.build import build_trainer, open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.format import named_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import load_vae
from stdit_train.components.precompute import Encoding, open_jobs
from stdit_train.components.sources import check_inputs
from stdit_train.config.load import from_dict, load_stage, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError
from stdit_train.estimate.devices import find_device_kind
from stdit_train.estimate.plan import dry_run, plan_stage
from stdit_train.pipeline.load import load_pipeline
from stdit_train.trainer import Trainer

CPU = torch.device("cpu")
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 16,
}  # fmt: skip
WAN = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
KINDS = {
    "AutoencoderKLWan": (AutoencoderKLWan, WAN, 5),
    "AutoencoderKLCogVideoX": (AutoencoderKLCogVideoX, COGVIDEOX, 9),
}


@pytest.fixture(scope="module", params=KINDS)
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """The folder of a tiny VAE, its class, and the fewest frames that it takes beside one."""
    kind, sizes, frames = KINDS[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    kind(**sizes).save_pretrained(folder)
    return folder, request.param, frames


def tiny(vae: Path, frames: int, parts: Path, **values: object) -> TrainConfig:
    settings = {
        "steps": 2, "global_batch": 2, "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 2,
        "validate_every": 100, "sample_every": 100, "model.preset": "demo", "model.depth": 1, "model.hidden_size": 32,
        "model.model_max_length": 16, "sampling.steps": 1, "data.frames": frames, "data.height": 16, "data.width": 16,
        "data.clips": 4, "data.vae": str(vae), "data.text_encoder": str(parts), "data.workers": 0,
    }  # fmt: skip
    return load_stage("16x512-temporal", settings | {key.replace("__", "."): value for key, value in values.items()})


def encoded(config: TrainConfig, cache: Path) -> TrainConfig:
    names = {"vae": config.data.vae, "text_encoder": config.data.text_encoder}
    for job in open_jobs(config, names, Encoding(str(cache)), World()):
        job.run()
    return from_dict(set_values(to_dict(config), {"data.source": str(cache)}))


def opened(config: TrainConfig, folder: Path) -> Trainer:
    check_inputs(config, begun=folder.exists())
    return open_trainer(config, config, RunFolder(folder), NullCallback())


def test_the_stage() -> None:
    stage = load_stage("16x512-temporal")
    assert (stage.data.frames, stage.data.height, stage.data.vae) == (17, 512, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae")
    found = plan_stage(stage, find_device_kind("h200"), 1)[0].estimate
    assert found.latent == (16, 5, 64, 64)
    assert found.tokens == 5 * 32 * 32
    assert not [note for note in found.assumed if "VAE" in note]
    assert found.phases["VAE encoding"] > 0
    with pytest.raises(ConfigError, match=r"16 frames: the VAE takes 1 \+ a multiple of 4, the nearest are 13 and 17"):
        plan_stage(load_stage("16x512-temporal", {"data.frames": 16}), find_device_kind("h200"), 1)


@pytest.mark.slow
def test_a_cache_is_trained_on_resumed_and_sampled_from(
    vae: tuple[Path, str, int], parts: Path, tmp_path: Path
) -> None:
    folder, name, frames = vae
    config = tiny(folder, frames, parts)
    count = 1 + (frames - 1) // 4
    assert dry_run(config).estimate.latent == (16, count, 2, 2)
    config = encoded(config, tmp_path / "cache")
    clips = LatentDataset(str(tmp_path / "cache"))
    assert clips.metadata["vae"]["class"] == name
    assert clips.load(0, seed=0, epoch=0).video.shape == (32, count, 2, 2)  # mean and log variance

    whole = opened(config, tmp_path / "run")
    assert whole.train().finished
    resumed_folder = Path(shutil.copytree(tmp_path / "run", tmp_path / "resumed"))
    run = RunFolder(resumed_folder)
    shutil.rmtree(run.latest_checkpoint().path)  # as if it had been killed after the first step
    resumed = opened(config, resumed_folder)
    assert resumed.step == 1
    assert resumed.train().finished
    first, second = (named_tensors(t.model, t.ema.model, t.optimizers) for t in (whole, resumed))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key

    pipeline = load_pipeline(str(tmp_path / "run"))
    assert type(pipeline.vae).__name__ == name
    video = pipeline(["a red circle moving left"], generator=torch.Generator().manual_seed(0)).frames
    assert video.shape == (1, 3, frames, 16, 16)
    assert video.isfinite().all()


def test_clips_that_do_not_fill_the_latents_are_refused_before_anything_is_loaded(
    vae: tuple[Path, str, int], parts: Path, tmp_path: Path
) -> None:
    folder, _, frames = vae
    config = tiny(folder, frames - 1, parts)
    message = rf"{frames - 1} frames: the VAE takes 1 \+ a multiple of {frames - 1}, the nearest are 1 and {frames} "
    with pytest.raises(ConfigError, match=message):
        check_inputs(config, begun=False)
    with pytest.raises(ConfigError, match=message):
        next(open_jobs(config, {"vae": "", "text_encoder": ""}, Encoding(str(tmp_path / "cache")), World()))
    check_inputs(config, begun=True)  # a run of a version that repeated the last frame goes on


def test_a_cache_of_another_vae_is_refused(vae: tuple[Path, str, int], parts: Path, tmp_path: Path) -> None:
    folder, name, frames = vae
    config = encoded(tiny(folder, frames, parts), tmp_path / "cache")
    kind, sizes, _ = KINDS[name]
    torch.manual_seed(1)
    kind(**sizes).save_pretrained(tmp_path / "other")
    for other, what in ((tmp_path / "other", "hash"), (parts / "vae", "class AutoencoderKL")):
        wrong = from_dict(set_values(to_dict(config), {"data.vae": str(other)}))
        with pytest.raises(ConfigError, match=rf"cache was encoded with the VAE .* this run has .*{what}"):
            opened(wrong, tmp_path / "run")


def test_weights_whose_channels_do_not_fit_are_refused(
    vae: tuple[Path, str, int], parts: Path, base: Path, tmp_path: Path
) -> None:
    folder, _, frames = vae
    config = tiny(folder, frames, parts, init=str(base), model__depth=2)
    with pytest.raises(ConfigError, match=r"base has in_channels 4, this run 16: choose the .* --vae"):
        opened(config, tmp_path / "run")


def test_a_model_that_is_no_vae_or_cannot_be_used_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the VAE|not a VAE"):
        load_vae(str(parts / "text_encoder"), CPU)
    allegro = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 2, up_block_types=("AllegroUpBlock3D",) * 2,
        block_out_channels=(8, 8), temporal_downsample_blocks=(True, False), temporal_upsample_blocks=(True, False),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    allegro.save_pretrained(tmp_path / "allegro")
    with pytest.raises(SettingsError, match="AutoencoderKLAllegro cannot be used: take AutoencoderKLWan"):
        load_vae(str(tmp_path / "allegro"), CPU)


def test_pictures_alone_are_no_clips(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    sizes = {"data.frames": 5, "data.height": 16, "data.width": 16, "vae.channels": [8, 8], "vae.groups": 4}
    settings = {"init": None, "data.source": str(tmp_path / "pictures"), "data.empty_captions": True, **sizes}
    config = load_stage("vae-demo-video", {**settings, "vae.temporal": 2, "data.single_frames": 0.0})
    with pytest.raises(ConfigError, match=r"pictures has pictures alone, and a video VAE needs clips"):
        build_trainer(config, RunFolder(tmp_path / "run"), NullCallback())


def test_a_vae_in_a_pipelines_repository(
    vae: tuple[Path, str, int], parts: Path, tmp_path: Path, hub_cache: Callable[[str], Path]
) -> None:
    folder, name, frames = vae
    shutil.copytree(folder, hub_cache("someone/video") / "vae")
    found = load_vae("someone/video/vae", CPU)
    assert type(found).__name__ == name
    with pytest.raises(ConfigError, match=r"nearest are 1 and"):
        check_inputs(tiny(Path("someone/video/vae"), frames - 1, parts), begun=False)
    with pytest.raises(ConfigError, match=r"in a pipeline it is someone/video/vae.*hf download someone/video\)"):
        load_vae("someone/video", CPU)
    with pytest.raises(ConfigError, match="no VAE at tests/none/such"):
        load_vae("tests/none/such", CPU)
