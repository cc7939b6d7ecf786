"""Pipelines by name: `STDiTPipeline.from_pretrained("demo")`, from whichever package declares it."""

import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the pipeline is an extra of stdit-model")

from stdit_model import STDiTPipeline
from stdit_model.errors import WeightsError, WeightsFileNotFoundError
from stdit_model.sampling import bundled


def declare(monkeypatch: pytest.MonkeyPatch, **folders: Path) -> None:
    """As if a package were installed that declares these pipelines."""
    names = {name: (lambda folder=folder: folder) for name, folder in folders.items()}
    monkeypatch.setitem(sys.modules, "package_with_pipelines", SimpleNamespace(**names))
    declared = EntryPoints(EntryPoint(name, f"package_with_pipelines:{name}", bundled.GROUP) for name in names)
    monkeypatch.setattr(bundled, "entry_points", declared.select)


def test_a_declared_pipeline_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    declare(monkeypatch, shapes=tmp_path / "inside")
    assert bundled.bundled_pipeline("shapes") == tmp_path / "inside"
    assert bundled.bundled_pipeline("demo") is None
    assert bundled.bundled_names() == ["shapes"]
    with pytest.raises(WeightsFileNotFoundError, match=r"a Hub id .* or a bundled pipeline \(shapes\)"):
        STDiTPipeline.from_pretrained("shape")


def test_without_stdit_train_the_name_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    declare(monkeypatch)
    with pytest.raises(WeightsFileNotFoundError, match="pip install stdit-train"):
        STDiTPipeline.from_pretrained("demo")


def test_a_local_folder_takes_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assets = pytest.importorskip("stdit_train.assets", reason="the demo comes with stdit-train")
    monkeypatch.chdir(tmp_path)
    assert STDiTPipeline.from_pretrained("demo").config.num_frames == 16
    (tmp_path / "demo").mkdir()
    with pytest.raises(WeightsFileNotFoundError, match="precedence over the bundled pipeline"):
        STDiTPipeline.from_pretrained("demo")
    shutil.copytree(assets.demo_folder(), tmp_path / "demo", dirs_exist_ok=True)
    index = tmp_path / "demo" / "model_index.json"
    index.write_text(index.read_text().replace('"num_frames": 16', '"num_frames": 4'))
    assert STDiTPipeline.from_pretrained("demo").config.num_frames == 4


def test_a_file_is_not_a_pipeline_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(WeightsFileNotFoundError, match="from_released"):
        STDiTPipeline.from_pretrained(tmp_path / "weights.pth")


def test_a_pipeline_whose_weights_are_damaged(tmp_path: Path) -> None:
    assets = pytest.importorskip("stdit_train.assets", reason="the demo comes with stdit-train")
    shutil.copytree(assets.demo_folder(), tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="broken: cannot load this pipeline") as caught:
        STDiTPipeline.from_pretrained(tmp_path / "broken")
    assert "\n" not in str(caught.value)
