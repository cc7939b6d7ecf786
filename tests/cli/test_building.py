"""`stdit build-demo`: everything from nothing, by the code that made the bundled model."""

from collections.abc import Callable
from pathlib import Path


def test_build_demo_from_nothing(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("build-demo", "built", "--vae-steps", "1", "--steps", "2", "--prompts", "1")
    assert done.code == 0, done
    demo = tmp_path / "built" / "demo"
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "README.md"):
        assert (demo / name).exists(), name
    card = (demo / "README.md").read_text()
    assert "| held-out | 1 |" in card and "| true clips after the VAE |" in card and "With `--frames 1`" in card
    again = stdit("build-demo", "built")
    assert again.code == 2 and "already exists" in again.err
    done = stdit("sample", "a red circle moving left", "--checkpoint", "built/demo", "--steps", "1", "--out", "x.mp4")
    assert done.code == 0, done
