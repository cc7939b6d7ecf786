"""The terms of a VAE's loss: their values, where their gradients go, and when they begin."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from stdit_train.config.schema import VaeConfig
from stdit_train.errors import ConfigError
from stdit_train.vae import reconstruction_loss as losses
from stdit_train.vae.networks import Networks, reconstruct
from stdit_train.vae.patch_discriminator import PatchDiscriminator, hinge

SMALL = VaeConfig(
    kind="video",
    temporal=2,
    channels=(8, 8),
    layers=1,
    groups=4,
    discriminator="3d",
    discriminator_start=10,
    discriminator_channels=8,
    discriminator_layers=1,
)
CLIPS = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def networks(config: VaeConfig = SMALL) -> Networks:
    torch.manual_seed(0)
    return Networks(config)


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, log_variance = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(losses.kl_divergence(mean, log_variance), expected)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    config = replace(SMALL, kl=0.5, discriminator="none")
    terms = losses.vae_loss(networks(config), config, CLIPS, NOISE, 100)
    assert list(terms) == ["loss", "l1", "kl"]
    again = reconstruct(networks(config).vae, CLIPS, NOISE)[0]
    torch.testing.assert_close(terms["l1"], (again - CLIPS).abs().mean((1, 2, 3, 4)))
    torch.testing.assert_close(terms["loss"], terms["l1"] + 0.5 * terms["kl"] / (3 * 5 * 16 * 16))


def test_codes_have_no_divergence() -> None:
    config = replace(SMALL, bottleneck="fsq", levels=(8, 5, 5, 5), discriminator="none")
    both = networks(config)
    terms = losses.vae_loss(both, config, CLIPS, NOISE, 0)
    assert list(terms) == ["loss", "l1"]
    torch.testing.assert_close(terms["loss"], terms["l1"])
    codes = reconstruct(both.vae, CLIPS)[1]
    assert torch.equal(codes[:, 1:] * 2, (codes[:, 1:] * 2).round())  # five levels: halves
    terms["loss"].sum().backward()
    assert both.vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_the_perceptual_term_compares_features_of_frames(features_file: Path) -> None:
    features = losses.load_features(str(features_file), torch.device("cpu"))
    other = CLIPS.flip(-1)
    assert torch.equal(losses.perceptual_distance(features, CLIPS, CLIPS), torch.zeros(2))
    found = losses.perceptual_distance(features, CLIPS, other)

    def length(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)  # some vectors are zero after the ReLU

    expected = []
    for a, b in zip(CLIPS, other, strict=True):
        frames = []
        for t in range(a.shape[1]):
            pairs = zip(features(a[None, :, t]), features(b[None, :, t]), strict=True)
            total = torch.zeros(())
            for x, y in pairs:
                difference = x / length(x) - y / length(y)
                total = total + difference.square().sum(1).mean()
            frames.append(total)
        expected.append(torch.stack(frames).mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    config = replace(SMALL, perceptual_weight=2.0, discriminator="none", kl=0.0)
    terms = losses.vae_loss(networks(config), config, CLIPS, NOISE, 0, features)
    torch.testing.assert_close(terms["loss"], terms["l1"] + 2.0 * terms["perceptual"])


def test_features_that_are_no_torchscript_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; give a TorchScript file"):
        losses.load_features(str(tmp_path / "none.pt"), torch.device("cpu"))
    (tmp_path / "text.pt").write_text("no")
    with pytest.raises(ConfigError, match="not a TorchScript file"):
        losses.load_features(str(tmp_path / "text.pt"), torch.device("cpu"))


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = losses.adaptive_weight(3.0 * layer[0], 0.5 * layer[1], layer)
    torch.testing.assert_close(weight, torch.tensor(3.0 / (0.5 + losses.DELTA)))
    assert losses.adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer) == losses.MOST  # nothing to balance


def test_the_discriminator_begins_late_and_trains_apart_from_the_vae() -> None:
    both = networks()
    assert both.discriminator is not None
    before = losses.vae_loss(both, SMALL, CLIPS, NOISE, 9)
    assert "generator" not in before
    terms = losses.vae_loss(both, SMALL, CLIPS, NOISE, 10)
    expected = before["loss"] + 0.5 * terms["adaptive_weight"] * terms["generator"] + terms["discriminator"]
    torch.testing.assert_close(terms["loss"], expected)
    own, critic = list(both.vae.parameters()), list(both.discriminator.parameters())
    assert all(g is None for g in torch.autograd.grad(terms["generator"].sum(), critic, None, True, allow_unused=True))
    left = torch.autograd.grad(terms["discriminator"].sum(), own, None, True, allow_unused=True)
    assert all(gradient is None for gradient in left)
    for loss, weights in ((terms["generator"], own), (terms["discriminator"], critic)):
        assert any(g.abs().sum() > 0 for g in torch.autograd.grad(loss.sum(), weights, retain_graph=True))
    # at the decoder's last layer the two parts of the loss weigh as 1 to `discriminator_weight`
    layer = both.vae.decoder.conv_out.weight
    parts = before["l1"].mean(), 0.5 * terms["adaptive_weight"].mean() * terms["generator"].mean()
    norms = [torch.autograd.grad(part, layer, retain_graph=True)[0].norm() for part in parts]
    torch.testing.assert_close(norms[1], 0.5 * norms[0], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("over_time", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_discriminator_sees_frames_or_clips(over_time: bool, frames: int) -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, 2, over_time)
    clips = torch.rand(2, 3, frames, 32, 32)
    logits = critic(clips)
    assert logits.shape == (2, 1, frames, 6, 6)
    changed = clips.clone()
    changed[:, :, -1] = 0.0
    same = torch.isclose(critic(changed), logits).flatten(3).all(-1).all(0)[0]
    reach = min(5, frames) if over_time else 1  # four convolutions, each a frame further
    assert same.tolist() == [True] * (frames - reach) + [False] * reach


def test_the_hinge_loss_asks_for_a_margin_of_one() -> None:
    true, made = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [-1.0, -1.0]])
    torch.testing.assert_close(hinge(true, made), torch.tensor([0.5, 0.0]))


def test_the_discriminator_learns_to_tell_stripes_from_noise() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, 1, over_time=True)
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-2)
    stripes = torch.ones(4, 3, 2, 16, 16) * torch.tensor([1.0, -1.0]).repeat(8)
    for _ in range(15):
        noise = torch.randn_like(stripes)
        loss = hinge(critic(stripes), critic(noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # 1 at the start
