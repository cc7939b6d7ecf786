"""benchmarks/findings/temporal_vae.py: runs of equal FLOPs, a wider VAE that starts as the old one, conclusions."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stdit_data import ShapesDataset, export_video
from stdit_train.ablation.arms import estimate_arm
from stdit_train.components.load import load_vae

FINDINGS = Path(__file__).parents[2] / "benchmarks" / "findings"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FINDINGS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import temporal_vae

    return temporal_vae


def rows(**psnr: list[float]) -> list[dict[str, str]]:
    more = {"steps": 5, "tflops": 7.2, "psnr_at_half": 20.0, "ssim": 0.9, "flicker": 1.0, "flicker_original": 1.1}
    more |= {"bits": 5000.0, "read": 1.0} | {f"psnr_{t}": 30.0 for t in range(9)}
    found: list[dict[str, Any]] = []
    for name, values in psnr.items():
        found += [{"part": "vae", "vae": name, "seed": s, "psnr": value, **more} for s, value in enumerate(values)]
    return [{key: str(value) for key, value in row.items()} for row in found]


def test_the_vaes_have_equal_flops_and_values(study: ModuleType) -> None:
    configs = {name: study.vae_config(name, 1) for name in study.VAES}
    flops = {name: config.steps * study.step_flops(config) for name, config in configs.items()}
    assert all(abs(each / flops["4x8x8"] - 1) < 0.01 for each in flops.values())
    assert configs["4x8x8"].steps == study.VAE_STEPS
    values = [study.VAES[name].values for name in ("1x8x8", "2x8x8", "4x8x8")]
    assert max(values) < 1.03 * min(values)
    assert configs["4x4x4-codes"].vae.stride == 4
    stdit = estimate_arm(study.stdit_config("1x8x8", "demo", 0))
    assert (stdit.latent, stdit.tokens) == ((4, 9, 6, 6), 81)


@torch.no_grad()
def test_a_wider_vae_decodes_what_it_did_before(study: ModuleType) -> None:
    image = load_vae("demo", torch.device("cpu"))
    wide = study.widened(image, 7, seed=0)
    frames = torch.rand(2, 3, 16, 16) * 2 - 1
    old, new = image.encode(frames).latent_dist, wide.encode(frames).latent_dist
    torch.testing.assert_close(new.mean[:, :4], old.mean)
    torch.testing.assert_close(new.logvar[:, :4], old.logvar)
    assert new.mean[:, 4:].std() > 0.01
    torch.testing.assert_close(wide.decode(new.mean).sample, image.decode(old.mean).sample)


def test_what_is_concluded(study: ModuleType, tmp_path: Path) -> None:
    clear = {"1x8x8": [30.0, 31.0, 30.5], "2x8x8": [25.0, 26.1, 25.4], "4x8x8": [33.0, 34.2, 33.4]}
    page = study.write_report(rows(**clear), tmp_path / "page.md").read_text()
    assert "reconstructs worse (2x8x8): **confirmed**" in page
    assert "reconstructs worse (4x8x8): **contradicted**" in page
    assert "makes worse videos (2x8x8): **open, with 0 of 3 seeds**" in page
    assert "STDiT on 4x8x8: 3" in " ".join(page.split())
    page = study.write_report(rows(**{"1x8x8": [30.0], "2x8x8": [25.0]}), tmp_path / "page.md").read_text()
    assert "reconstructs worse (2x8x8): **open, with 1 of 3 seeds**" in page
    assert "VAE 1x8x8: 2" in page
    unclear = {"1x8x8": [30.0, 31.0, 30.5], "2x8x8": [25.0, 36.1, 31.0]}
    page = study.write_report(rows(**unclear), tmp_path / "page.md").read_text()
    assert "reconstructs worse (2x8x8): **open, not distinguishable**" in page


def test_what_is_concluded_of_patches(study: ModuleType, tmp_path: Path) -> None:
    rest = {"validation_loss": "0.3", "all": "0.1"}
    shares = {"base": [0.4, 0.41, 0.42], "patch-222": [0.3, 0.32, 0.31]}
    found = [
        {"part": "patches", "vae": arm, "seed": str(seed), "steps": "5", "tflops": "1", "aspects": str(share), **rest}
        for arm, values in shares.items()
        for seed, share in enumerate(values)
    ]
    page = study.write_report(found, tmp_path / "page.md").read_text()
    assert "A 3-D patch embedder in its place makes worse videos: **confirmed**" in page
    assert "| patch-222 - base | aspects |" in page
    page = study.write_report(found[:-1], tmp_path / "page.md").read_text()
    assert "makes worse videos: **open, with 2 of 3 seeds**" in page


def test_rows_are_kept_whole(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.csv")
    study.append({"part": "vae", "vae": "1x8x8", "seed": 0, "psnr": 30.123456789})
    study.append({"part": "stdit", "vae": "1x8x8", "seed": 0, "all": 0.5})
    assert study.read_rows() == [
        {"part": "vae", "vae": "1x8x8", "seed": "0", "psnr": "30.1235", "all": ""},
        {"part": "stdit", "vae": "1x8x8", "seed": "0", "psnr": "", "all": "0.5"},
    ]


@pytest.fixture
def real(tmp_path: Path) -> tuple[str, str]:
    """Two folders, one video each."""
    clips = ShapesDataset(frames=12, height=64, width=80)
    for index, name in enumerate(("train", "test")):
        (tmp_path / name).mkdir()
        export_video(clips.load(index).video, tmp_path / name / "clip.mp4", fps=8)
    return str(tmp_path / "train"), str(tmp_path / "test")


@pytest.mark.slow
def test_real_clips(study: ModuleType, real: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import temporal_vae_measure

    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(study, "VAE_STEPS", 2)
    monkeypatch.setattr(temporal_vae_measure, "CHECKED", 2)
    found = study.Study(tmp_path / "runs", real)
    found.run(["4x8x8", "4x4x4-codes"], seeds=1)
    assert [(row["part"], row["vae"]) for row in study.read_rows()] == [("real-start", "1x8x8"), ("real", "4x8x8")]
    start, trained = study.read_rows()
    assert float(start["flicker_original"]) == float(trained["flicker_original"])
    assert "read" not in trained
    page = study.write_report(study.read_rows(), tmp_path / "page.md").read_text()
    assert "| 1x8x8, start | 1296 |" in page.partition("## Reconstruction of real clips")[2]
