"""A VAE's run: what it leaves, that it goes on to the bit, what it starts from, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from stdit_data.datasets.shapes import ShapesDataset
from stdit_model import CausalVideoVAE, STDiTPipeline
from stdit_train.build import build_trainer, open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.format import named_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import load_vae
from stdit_train.components.sources import check_inputs
from stdit_train.config.load import from_dict, load_stage, set_values, to_dict
from stdit_train.config.schema import TrainConfig, VaeConfig
from stdit_train.errors import ConfigError
from stdit_train.estimate.training import estimate_run
from stdit_train.evaluation.vae_scores import evaluate_vae
from stdit_train.tracking.metrics import read_metrics
from stdit_train.trainer import Trainer
from stdit_train.vae.networks import Networks, build_vae, reconstruct
from stdit_train.vae.reconstruction_loss import vae_loss
from stdit_train.vae.vae_task import save_vae

CPU = torch.device("cpu")


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return from_dict(set_values(to_dict(config), {key.replace("__", "."): value for key, value in values.items()}))


def trained(config: TrainConfig, folder: Path) -> Trainer:
    trainer = open_trainer(config, config, RunFolder(folder), NullCallback())
    assert trainer.train().finished
    return trainer


def test_an_image_vae_learns_and_is_published(tiny_image: TrainConfig, tmp_path: Path, parts: Path) -> None:
    config = changed(tiny_image, steps=40, global_batch=8, optimizer__lr=1e-2, validate_every=40, checkpoint_every=40)
    trainer = trained(config, tmp_path / "run")
    run = trainer.run
    rows = [row for row in read_metrics(run.metrics_file) if "loss" in row]
    assert rows[-1]["l1"] < 0.5 * rows[0]["l1"]
    assert {"loss", "l1", "kl", "gradient_norm", "samples_per_second"} < rows[0].keys()
    assert not any(name.startswith("loss_t") for name in rows[0])
    checked = next(row for row in read_metrics(run.metrics_file) if "validation_loss" in row)
    assert checked.keys() == {"step", "validation_loss", "validation_psnr", "validation_ssim"}
    assert (run.samples / "step-000040.png").exists()
    assert len(list(run.samples.glob("step-000040-*.mp4"))) == 4
    assert run.loss_plot.exists()

    published = AutoencoderKL.from_pretrained(run.vae)
    for name, value in trainer.ema.model.state_dict().items():
        assert torch.equal(published.state_dict()[name], value), name
    video = torch.stack([trainer.outputs.validation.load(i, seed=0, epoch=0).video for i in range(8)])
    mean = reconstruct(published, video)[1]
    normalised = (mean - torch.tensor(published.config.latents_mean).view(1, -1, 1, 1, 1)) / torch.tensor(
        published.config.latents_std
    ).view(1, -1, 1, 1, 1)
    assert normalised.mean().abs() < 0.3
    assert 0.3 < normalised.std() < 1.5

    # the run's folder is the VAE of a run of the transformer
    overrides = {"data.vae": str(run.path), "data.text_encoder": str(parts), "data.frames": 2, "steps": 1}
    overrides |= {"data.height": 16, "data.width": 16, "data.clips": 4, "global_batch": 2, "model.depth": 1}
    overrides |= {"validate_every": 100, "sampling.steps": 1, "model.hidden_size": 32}
    stdit = load_stage("demo", overrides)
    check_inputs(stdit, begun=False)
    assert trained(stdit, tmp_path / "stdit").step == 1


def test_a_video_vae_is_published_and_loaded(tiny_video: TrainConfig, tmp_path: Path, parts: Path) -> None:
    trainer = trained(tiny_video, tmp_path / "run")
    rows = [row for row in read_metrics(trainer.run.metrics_file) if "loss" in row]
    assert ["discriminator" in row for row in rows] == [False, False, True, True, True, True]
    found = load_vae(str(trainer.run.path), CPU)
    assert isinstance(found, CausalVideoVAE)
    assert found.config.temporal_compression_ratio == 2
    for name, value in trainer.ema.model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name

    overrides = {"data.vae": str(trainer.run.path), "data.text_encoder": str(parts), "data.frames": 5, "steps": 1}
    overrides |= {"data.height": 16, "data.width": 16, "data.clips": 4, "global_batch": 2, "model.depth": 1}
    overrides |= {"validate_every": 100, "sampling.steps": 1, "model.hidden_size": 32, "micro_batch": 2}
    stdit = load_stage("demo", overrides)
    assert estimate_run(stdit).latent == (4, 3, 8, 8)
    assert trained(stdit, tmp_path / "stdit").step == 1
    pipeline = STDiTPipeline.from_pretrained(tmp_path / "stdit" / "pipeline")
    assert isinstance(pipeline.vae, CausalVideoVAE)


@pytest.mark.slow
def test_a_video_vae_of_codes_is_trained_measured_and_trained_on(
    tiny_video: TrainConfig, tiny_image: TrainConfig, tmp_path: Path, parts: Path
) -> None:
    clips = ShapesDataset(frames=1, height=16, width=16)
    stills = [clips.load(index, seed=0, epoch=0).video for index in range(8)]
    save_vae(build_vae(tiny_image.vae), tmp_path / "image", stills, CPU)  # with the statistics of its latents
    config = changed(
        tiny_video, vae__bottleneck="fsq", vae__levels=[8, 6, 5, 5], vae__discriminator="none",
        init=str(tmp_path / "image"), steps=2, precision="bf16",
    )  # fmt: skip
    trainer = trained(config, tmp_path / "run")
    rows = [row for row in read_metrics(trainer.run.metrics_file) if "loss" in row]
    assert "l1" in rows[0]
    assert "kl" not in rows[0]
    found = load_vae(str(trainer.run.path), CPU)
    assert list(found.config.levels) == [8, 6, 5, 5]
    scores = evaluate_vae(found, (trainer.outputs.validation.load(i, seed=0, epoch=0) for i in range(2)))
    used, there_are = scores.codes or (0, 0)
    assert 1 < used <= there_are == 1200

    overrides = {"data.vae": str(trainer.run.path), "data.text_encoder": str(parts), "data.frames": 5, "steps": 1}
    overrides |= {"data.height": 16, "data.width": 16, "data.clips": 4, "global_batch": 2, "model.depth": 1}
    overrides |= {"validate_every": 100, "sampling.steps": 1, "model.hidden_size": 32}
    assert trained(load_stage("demo", overrides), tmp_path / "stdit").step == 1
    assert STDiTPipeline.from_pretrained(tmp_path / "stdit" / "pipeline").vae.config.levels == [8, 6, 5, 5]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param("image", "fp32", marks=pytest.mark.slow),
        pytest.param("video", "bf16", marks=pytest.mark.slow),
        ("video", "bf16-weights"),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(
    kind: str, precision: str, tiny_image: TrainConfig, tiny_video: TrainConfig, features_file: Path, tmp_path: Path
) -> None:
    """Killed after step 4, it goes on from the checkpoint of step 3, with discriminator, features and micro-batches."""
    config = tiny_image if kind == "image" else changed(tiny_video, vae__perceptual=str(features_file), micro_batch=1)
    config = changed(config, precision=precision)
    script = """
        import json, os, signal, sys, torch
        from pathlib import Path
        from stdit_train.config.load import from_dict
        from stdit_train.checkpoint.run_folder import RunFolder
        from stdit_train.build import open_trainer
        torch.set_num_threads(1)
        class Silent:
            def started(self, *_): pass
            def stepped(self, step, *_):
                if step == 4: os.kill(os.getpid(), signal.SIGKILL)
        config = from_dict(json.loads(sys.argv[2]))
        open_trainer(config, config, RunFolder(Path(sys.argv[1])), Silent()).train()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run"), json.dumps(to_dict(config))]
    assert subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    actual, expected = trained(config, tmp_path / "run"), trained(config, tmp_path / "whole")
    tensors = [named_tensors(t.model, t.ema.model, t.optimizers) for t in (actual, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    if kind == "video":
        assert any(name.startswith("optimizer.discriminator.") for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    losses = [[row["loss"] for row in read_metrics(t.run.metrics_file) if "loss" in row] for t in (actual, expected)]
    assert losses[0] == losses[1]


def test_micro_batches_and_recomputation_change_nothing(tiny_video: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny_video, vae__discriminator="none", steps=3)
    found = []
    for i, values in enumerate(({}, {"micro_batch": 1}, {"activation_checkpointing": True})):
        trainer = trained(changed(config, **values), tmp_path / str(i))
        found.append([row["loss"] for row in read_metrics(trainer.run.metrics_file) if "loss" in row])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_two_processes_train_as_one(tiny_video: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny_video, vae__discriminator="none", data__single_frames=0.0, checkpoint_every=6)
    runs = [[count, str(tmp_path / str(count)), to_dict(config)] for count in (1, 2)]
    script = Path(__file__).parents[1] / "distributed" / "many.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out.json")], input=json.dumps(runs), text=True, check=False
    )
    assert done.returncode == 0
    alone, both = json.loads((tmp_path / "out.json").read_text())
    assert list(both[0]["losses"].values()) == pytest.approx(list(alone[0]["losses"].values()), rel=1e-4)
    assert both[0]["samples"] != both[1]["samples"]
    ends = [load_vae(str(tmp_path / count), CPU).state_dict() for count in ("1", "2")]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4)


def test_a_video_vae_starts_as_the_image_vae_that_it_is_given(
    tiny_image: TrainConfig, tiny_video: TrainConfig, tmp_path: Path
) -> None:
    image = build_vae(tiny_image.vae)
    image.save_pretrained(tmp_path / "image")
    config = changed(tiny_video, init=str(tmp_path / "image"))
    check_inputs(config, begun=False)
    run = RunFolder(tmp_path / "run")
    run.create(config)
    vae = build_trainer(config, run, NullCallback()).ema.model
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = reconstruct(image, clip[:, :, :1])[0]
        torch.testing.assert_close(reconstruct(vae, clip)[0][:, :, :1], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reconstruct(vae, clip[:, :, :1])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.frames": 6}, "6 frames: a video VAE of vae.temporal 2 .* the nearest are 5 and 7"),
        ({"data.frames": 1}, "needs clips, not images alone: set data.frames to 3 or more"),
        ({"data.height": 17}, "data.height 17 is not a multiple of the VAE's stride 2: take 16 or 18"),
        ({"optimizer.name": "muon"}, "optimizer.name is muon, which a VAE cannot have: --set optimizer.name=adamw"),
        ({"precision": "fp16"}, "precision is fp16, which a VAE cannot have: --set precision=bf16"),
        ({"compile": True}, "compile is true, which a VAE cannot have: --set compile=false"),
        ({"vae.groups": 3}, "vae.groups 3 does not divide vae.channels 8"),
        ({"vae.bottleneck": "fsq", "vae.levels": [8, 5]}, "vae.levels has 2 numbers for vae.latent_channels 4"),
        ({"vae.bottleneck": "fsq", "vae.kind": "image"}, "vae.bottleneck=fsq is for video VAEs"),
        ({"vae.bottleneck": "fsq", "vae.levels": [8, 5, 5, 1]}, "vae.levels: .* greater than or equal to 2, not 1"),
        ({"vae.channels": [8], "vae.temporal": 4}, "vae.temporal 4 needs 3 vae.channels, not 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], message: str, tiny_video: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(set_values(to_dict(tiny_video), values))


def test_weights_of_another_kind_are_refused(tiny_image: TrainConfig, tiny_video: TrainConfig, tmp_path: Path) -> None:
    build_vae(tiny_video.vae).save_pretrained(tmp_path / "video")
    build_vae(replace(tiny_image.vae, latent_channels=8)).save_pretrained(tmp_path / "wide")
    run = RunFolder(tmp_path / "run")
    for config, init, message in (
        (tiny_image, tmp_path / "video", "is a CausalVideoVAE, this run trains a AutoencoderKL"),
        (tiny_video, tmp_path / "wide", "has latent_channels 8, this run 4: set vae.latent_channels to match"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_trainer(changed(config, init=str(init)), run, NullCallback())
    with pytest.raises(ConfigError, match=r"no VAE at .*none: give a folder or a Hub id with --init"):
        check_inputs(changed(tiny_image, init=str(tmp_path / "none")), begun=False)


def test_the_estimate_counts_the_vae(tiny_video: TrainConfig) -> None:
    config = changed(tiny_video, micro_batch=2, vae__discriminator="none")
    one, recomputed = estimate_run(config), estimate_run(changed(config, activation_checkpointing=True))
    assert one.parameters == sum(p.numel() for p in build_vae(config.vae).parameters())
    assert (one.latent, one.tokens) == ((4, 3, 8, 8), 192)
    assert one.memory["optimizer"] == 8 * one.parameters
    double = estimate_run(changed(config, micro_batch=1)).memory["activations"]
    assert one.memory["activations"] == 2 * double > 0
    assert recomputed.step_flops == one.step_flops // 3 * 4
    assert recomputed.memory["activations"] < one.memory["activations"]


def test_the_estimate_counts_the_discriminator(tiny_video: TrainConfig) -> None:
    """Its weights and the FLOPs of a step, as torch counts them in one; all of it is kept but no average."""
    config = changed(tiny_video, micro_batch=2)
    alone, both = estimate_run(changed(config, vae__discriminator="none")), estimate_run(config)
    networks = Networks(config.vae)
    assert both.parameters == sum(p.numel() for p in networks.parameters()) > alone.parameters
    assert both.memory["optimizer"] == 8 * both.parameters
    assert both.memory["EMA"] == alone.memory["EMA"]
    assert both.memory["activations"] > alone.memory["activations"]

    def counted(config: VaeConfig) -> int:
        with FlopCounterMode(display=False) as counter:
            vae_loss(networks, config, torch.rand(2, 3, 5, 16, 16), torch.randn(2, 4, 3, 8, 8), 10)[
                "loss"
            ].sum().backward()
        return counter.get_total_flops()

    own = counted(config.vae) - counted(replace(config.vae, discriminator_start=100))
    assert both.step_flops - alone.step_flops == pytest.approx(own, rel=0.15)
