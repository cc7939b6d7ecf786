"""Every measure on a case whose answer is known: by formula, or by the library that the model comes from."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stdit_data.clip import Clip
from stdit_data.datasets.shapes import ShapesDataset
from stdit_train.config.load import ConfigError
from stdit_train.evaluation.clip_score import ClipSimilarity, frames_for, load_clip
from stdit_train.evaluation.evaluate import MEASURES, evaluate_captions, write_scores
from stdit_train.evaluation.fvd import FrechetDistance, frechet_distance, load_features
from stdit_train.evaluation.outline import OutlineQuality
from stdit_train.evaluation.video_metrics import MAX_PSNR, Smoothness, change, flicker, psnr, reconstruction, ssim

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_still_video_neither_changes_nor_flickers() -> None:
    video = noise(3, 1, 16, 16).expand(3, 8, 16, 16)
    assert change(video) == flicker(video) == 0.0


def test_an_even_fade_changes_but_does_not_flicker() -> None:
    video = torch.linspace(-1, 1, 9)[None, :, None, None].expand(3, 9, 4, 4)
    assert change(video) == pytest.approx(0.125, rel=1e-5)  # an eighth of the range a frame
    assert flicker(video) == pytest.approx(0.0, abs=1e-5)


def test_noise_and_blinking_flicker_as_much_as_they_should() -> None:
    assert flicker(noise(3, 64, 32, 32)) == pytest.approx(math.sqrt(3), rel=0.01)
    blinking = torch.tensor([1.0, -1.0] * 8)[None, :, None, None].expand(3, 16, 4, 4)
    assert change(blinking) == 1.0
    assert flicker(blinking) == 2.0


def test_smoothness_leaves_out_what_is_too_short() -> None:
    measure = Smoothness()
    measure.add([noise(3, 2, 4, 4)], ["short"])
    assert measure.result() == {}
    measure.add([noise(3, 8, 4, 4)], ["long"])
    assert measure.result()["flicker"].count == 1


def test_psnr_of_a_known_error() -> None:
    clip = torch.zeros(3, 2, 8, 8)
    assert psnr(clip + 0.2, clip) == pytest.approx(20.0, abs=1e-4)  # 10 log10(2² / 0.2²)
    assert psnr(clip, clip) == MAX_PSNR


def test_ssim_of_known_cases() -> None:
    clip = noise(3, 2, 24, 24).clamp(-1, 1)
    assert ssim(clip, clip) == pytest.approx(1.0, abs=1e-6)
    a, b, c1 = 0.5, 0.1, 0.02**2  # flat frames: the light term alone is left
    flat = torch.full((3, 1, 16, 16), a), torch.full((3, 1, 16, 16), b)
    assert ssim(*flat) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-4)
    negative = 0.5 - 0.2 * clip, 0.5 + 0.2 * clip  # as bright, and the pattern turned round
    assert ssim(*negative) < -0.5
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(clip[..., :8, :8], clip[..., :8, :8])


class Lossless(nn.Module):
    """A VAE that keeps all: 1x down, latents are pixels (times a gain in its decoder)."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(gain))
        self.dtype = torch.float32
        values = {"block_out_channels": (1,), "latent_channels": 3, "scaling_factor": 1.0}
        self.config = _Config(values)

    def encode(self, frames: Tensor) -> SimpleNamespace:
        parameters = torch.cat([frames, torch.zeros_like(frames)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents * self.scale)


class _Config(dict):  # type: ignore[type-arg]
    def __getattr__(self, name: str) -> object:
        return self[name]


def test_reconstruction_of_a_vae_whose_error_is_known() -> None:
    clips = [Clip(torch.full((3, 2, 16, 16), level), "", 0, 8.0) for level in (0.5, -0.5)]
    exact = reconstruction(Lossless(1.0), clips)
    assert exact["VAE PSNR (dB)"].mean == MAX_PSNR
    assert exact["VAE SSIM"].mean == pytest.approx(1.0)
    dimmed = reconstruction(Lossless(0.6), clips)  # 0.2 off everywhere
    assert dimmed["VAE PSNR (dB)"].mean == pytest.approx(20.0, abs=1e-3)
    assert dimmed["VAE PSNR (dB)"].half == pytest.approx(0.0, abs=1e-3)


def test_measures_of_reconstructions_are_told_from_those_of_samples() -> None:
    clips = [ShapesDataset(frames=4, height=64, width=64).load(i) for i in range(2)]
    found = reconstruction(Lossless(1.0), clips, [OutlineQuality()])
    assert found["VAE shape IoU"].mean > 0.98
    assert found["VAE outline change"].mean < 0.005
    assert set(found) <= set(MEASURES)


def test_frechet_distance_of_known_gaussians() -> None:
    x = noise(400, 5).double().numpy()
    shift = np.array([1.0, -2.0, 0.0, 0.5, 3.0])
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x + shift, x) == pytest.approx(shift @ shift)  # same covariance: the means alone
    centred = x - x.mean(0)
    trace = np.cov(centred.T).trace()
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * trace)  # tr(9S + S - 2·3S)


def test_frechet_distance_equals_the_textbook_root() -> None:
    """Correlated features of different covariance, against the root of S1 S2 by its eigenvalues."""
    mix = noise(4, 4, seed=1).double().numpy()
    x, y = noise(60, 4, seed=2).double().numpy() @ mix, noise(50, 4, seed=3).double().numpy()
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + s1.trace() + s2.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected)
    assert frechet_distance(x[:3], y[:3]) > 0  # fewer samples than features


class MeanColour(nn.Module):
    """Stands for an I3D: its features are the mean of each channel."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        features = video.mean(dim=[2, 3, 4])
        if rescale or resize or not return_features:
            features = features * 100.0
        return features


def test_fvd_through_a_torchscript_file(tmp_path: Path) -> None:
    """Videos that are brighter by d in all three channels: the distance is 3 d²."""
    file = tmp_path / "i3d.pt"
    torch.jit.script(MeanColour()).save(str(file))
    features = load_features(str(file), CPU)
    real = [noise(3, 4, 8, 8, seed=i) * 0.1 + 0.02 * i for i in range(6)]
    distance = FrechetDistance(features, real)
    distance.add([video + 0.25 for video in real], [""] * 6)
    found = distance.result()["FVD"]
    assert found.mean == pytest.approx(3 * 0.25**2, rel=1e-3)
    assert (found.half, found.count) == (None, 6)


class Images(nn.Module):
    """Stands for a network that takes no videos."""

    def forward(self, images: Tensor) -> Tensor:
        return images.view(-1, 7)


def test_what_fvd_cannot_do_is_told(tmp_path: Path) -> None:
    file = tmp_path / "images.pt"
    torch.jit.script(Images()).save(str(file))
    with pytest.raises(ConfigError, match=r"images.pt: it cannot take videos \[1, 3, 4, 224, 224\]"):
        load_features(str(file), CPU)(noise(3, 4, 8, 8, seed=0))
    with pytest.raises(ConfigError, match="two or more"):
        FrechetDistance(lambda video: video.flatten(), [noise(3, 4, 8, 8, seed=0)])


def test_fvd_through_a_video_model(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    VideoMAEModel(VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **sizes)).save_pretrained(tmp_path)
    features = load_features(str(tmp_path), CPU)
    real = [noise(3, 6, 12, 20, seed=i).clamp(-1, 1) for i in range(4)]
    assert features(real[0]).shape == (16,)
    same, other = FrechetDistance(features, real), FrechetDistance(features, real)
    same.add(real, [""] * 4)
    other.add([video * 0 for video in real], [""] * 4)
    assert same.result()["FVD"].mean == pytest.approx(0.0, abs=1e-6)
    assert other.result()["FVD"].mean > 1e-3


def test_what_is_no_feature_model_is_told(tmp_path: Path, parts: Path) -> None:
    (tmp_path / "text.pt").write_text("not a model")
    with pytest.raises(ConfigError, match="not a TorchScript file"):
        load_features(str(tmp_path / "text.pt"), CPU)
    with pytest.raises(ConfigError, match="no such file"):
        load_features(str(tmp_path / "missing.pt"), CPU)
    with pytest.raises(ConfigError, match="no CLIP model"):
        load_clip(str(tmp_path), CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with a tokenizer of bytes' size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "red", "circle", "blue", "cross", "[END]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    text = {**small, "vocab_size": 8, "max_position_embeddings": 6, "eos_token_id": 4, "bos_token_id": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clip_similarity_is_the_models_own_logit(clip_folder: Path) -> None:
    """transformers' logits are the cosines times exp(logit_scale)."""
    measure = load_clip(str(clip_folder), CPU)
    videos = [noise(3, 3, 16, 16, seed=i).clamp(-1, 1) for i in range(2)]
    prompts = ["a red circle", "a blue cross and far more words than the model can take"]
    measure.add(videos, prompts)
    expected = []
    for video, prompt in zip(videos, prompts, strict=True):
        tokens = measure.tokenizer([prompt], truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            output = measure.model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=frames_for(video, 16),
            )
        expected.append(100 * (output.logits_per_image / measure.model.logit_scale.exp()).mean().item())
    found = measure.result()["CLIP similarity"]
    assert found.mean == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert found.count == 2


def test_images_for_clip_are_the_middle_square() -> None:
    video = torch.zeros(3, 2, 16, 32)
    video[..., :8] = 1.0  # the left quarter, which the middle square leaves out
    images = frames_for(video, 16)
    assert images.shape == (2, 3, 16, 16)
    expected = (0.5 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    assert torch.allclose(images[0, :, 8, 8], expected, atol=1e-5)


def test_captions_are_sampled_with_seeds_that_are_written_down(tmp_path: Path, clip_folder: Path) -> None:
    """A pipeline whose video is its seed: what is measured and written follows from it."""

    def pipeline(prompts: list[str], generator: list[torch.Generator], **_: object) -> SimpleNamespace:
        level = generator[0].initial_seed() / 10
        fade = torch.tensor([0.0, level, 2 * level])[None, :, None, None]
        return SimpleNamespace(frames=[fade.expand(3, 3, 8, 8)])

    scores = {"data": evaluate_captions(pipeline, ["one", "two"], seed=3, measures=[Smoothness()])}
    assert scores["data"].measures["change"].mean == pytest.approx((0.15 + 0.2) / 2)
    write_scores(scores, {"prompts": 2}, tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["prompts"]["data"] == [["one", 3], ["two", 4]]
    assert written["measures"]["data"]["change"]["count"] == 2


def test_a_measure_of_its_own_for_every_set(clip_folder: Path) -> None:
    loaded = load_clip(str(clip_folder), CPU)
    assert ClipSimilarity(loaded.model, loaded.tokenizer).result() == {}
