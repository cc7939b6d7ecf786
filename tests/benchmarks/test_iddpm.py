"""benchmarks/findings/iddpm.py: the noise levels that it measures at, and the tables that it writes."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stdit_model.diffusion import signal_to_noise
from stdit_train.config.schema import ObjectiveConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "findings"


@pytest.fixture
def iddpm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import iddpm

    return iddpm


@pytest.mark.parametrize(
    "values",
    [{"name": "flow"}, {"name": "flow", "shift": 4.0}, {}, {"prediction": "v_prediction", "zero_terminal_snr": True}],
)
def test_levels_have_the_ratio_they_are_looked_up_by(iddpm: ModuleType, values: dict[str, Any]) -> None:
    objective = ObjectiveConfig(**values)
    for decade in iddpm.DECADES:
        level = torch.tensor([iddpm.level_of(objective, 10.0**decade)])
        assert 0 <= level < 1
        assert iddpm._snr_of(objective, level).log10().item() == pytest.approx(decade, abs=0.05)
    shares = [iddpm.share_near(objective, decade) for decade in range(8, -10, -1)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)


def test_the_probes_change_what_they_say(iddpm: ModuleType) -> None:
    probes = {probe.name: probe.config for probe in iddpm.PROBES}
    assert len(probes) == len(iddpm.PROBES)
    assert len(set(probes.values())) == len(probes)
    same = {(config.steps, config.seed, config.global_batch, config.data) for config in probes.values()}
    assert len(same) == 1
    snr = signal_to_noise(torch.tensor([0, 999]))
    assert float(snr.max()) < iddpm.ALL


def test_the_page_gets_the_tables_of_what_has_been_measured(iddpm: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Weights.\n\n<!-- weights -->\n<!-- end -->\n\nScores.\n\n<!-- scores -->\nold\n<!-- end -->\n\nEnd.\n"
    )
    result = {
        "about": "v-prediction",
        "scores": {"default": {"all": {"share": 0.5, "low": 0.25, "high": 0.75}}},
        "levels": [{"decade": decade, "error": 0.1, "gradient": 1.0} for decade in iddpm.DECADES],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "v.json").write_text(json.dumps(result))
    for _ in range(2):
        iddpm.write_page(tmp_path, page)
        text = page.read_text()
        assert text.startswith("Weights.\n") and text.endswith("<!-- end -->\n\nEnd.\n")
        assert text.count("| v | v-prediction | the probe's own | 0.50 (0.25 to 0.75) |") == 1
        assert "old" not in text
        row = next(line for line in text.splitlines() if line.startswith("| 1e-2 |"))
        assert row.endswith("| 1.2 | 0.01 | 1 | 0.01 |")  # flow, epsilon, v, min-SNR
