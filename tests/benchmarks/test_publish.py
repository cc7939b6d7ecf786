"""benchmarks/ablation/publish.py: the verdicts of plan.md, from made-up losses and from real runs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from stdit_train.ablation.results import Result

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "ablation"


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import publish

    return publish


def results(**losses: list[float] | list[list[float]]) -> tuple[Result, ...]:
    """Runs of 10 steps; a seed's losses are those at the end, or those after 8, 9 and 10 steps."""
    made = []
    for arm, seeds in losses.items():
        for seed, given in enumerate(seeds):
            three = given if isinstance(given, list) else [given] * 3
            curve = [(1, 9.0), *zip((8, 9, 10), three, strict=True)]
            made.append(Result(arm, seed, 10, 1000, 1.0, 2 * 10**9, 0.1, 1, 1.0, three[-1], curve, {}))
    return tuple(made)


BASE = [1.0, 1.1, 1.2]  # the mean loss of seq is 1.1
SIX = [*BASE, *BASE]


def shifted(by: float, base: list[float] = BASE) -> list[float]:
    """Seeds that differ from `base` by nearly the same."""
    return [loss + by + (seed - 1) * 1e-4 for seed, loss in enumerate(base)]


def test_the_first_two_claims(publish: ModuleType) -> None:
    for by, expected in ((-0.1, "confirmed"), (0.1, "contradicted")):
        table = publish.Table("demo", "steps", results(dit=shifted(by), seq=BASE))
        assert table.verdict(("dit", "seq")) == expected
        assert table.settled(("dit", "seq"))
    table = publish.Table("demo", "steps", results(dit=[1.1, 1.0, 1.2], seq=BASE))
    assert table.verdict(("dit", "seq")) == "not separated"
    assert publish.Table("demo", "steps", results(dit=[1.0], seq=BASE)).verdict(("dit", "seq")).startswith("one seed")
    assert publish.Table("demo", "steps", results(seq=BASE)).verdict(("dit", "seq")) == "not run yet"


def test_level_is_within_a_hundredth_of_seqs_loss(publish: ModuleType) -> None:
    """The mean loss of seq is 1.1, so the interval must lie within 0.011 of zero."""

    def said(by: float, spread: float) -> str:
        latte = [loss - by - (seed - 1) * spread for seed, loss in enumerate(BASE)]  # t(2) = 4.303, so +- 2.48 spreads
        return publish.Table("demo", "steps", results(seq=BASE, parallel=BASE, latte=latte)).verdict(publish.LEVEL_PAIR)

    assert said(0.0, 0.004) == "confirmed: level"  # +- 0.0099
    assert said(0.0, 0.005) == "not separated"  # +- 0.0124 reaches further
    assert said(0.005, 0.001) == "confirmed: level"  # apart, but by less than a hundredth
    assert said(0.009, 0.002) == "not separated"  # apart, and as likely within a hundredth as beyond
    assert said(0.1, 0.001) == "contradicted: latte is better"
    assert said(-0.1, 0.001) == "contradicted: parallel is better"


def test_a_verdict_that_changes_late_is_not_settled(publish: ModuleType) -> None:
    early = [[loss + 0.1, loss - 0.1, loss - 0.1 + (seed - 1) * 1e-4] for seed, loss in enumerate(SIX)]
    table = publish.Table("demo", "steps", results(dit=early, seq=SIX))
    assert table.verdict(("dit", "seq"), 0.8) == "contradicted"
    assert table.verdict(("dit", "seq")) == "confirmed"
    assert not table.settled(("dit", "seq"))
    assert "not settled (confirmed at the end)" in "\n".join(publish.answer([table]))


def test_what_counts_is_what_both_recipes_agree_on(publish: ModuleType) -> None:
    def line(demo: float, published: float, base: list[float] = SIX) -> str:
        tables = [
            publish.Table(recipe, "steps", results(dit=shifted(by, base), seq=base))
            for recipe, by in (("demo", demo), ("published", published))
        ]
        return publish.answer(tables)[2]

    assert line(-0.1, -0.2).endswith("| **confirmed** |")
    assert line(0.1, 0.2).endswith("| **contradicted** |")
    assert line(0.1, -0.2).endswith("| no |")
    few = line(-0.1, -0.2, BASE)
    assert few.endswith("| no |") and "3 of 6 seeds yet (confirmed)" in few
    alone = publish.Table("demo", "steps", results(dit=shifted(-0.1, SIX), seq=SIX))
    assert publish.answer([alone])[2].endswith("| confirmed | no |")


def test_each_study_counts_its_own_seeds_and_names_its_own_files(publish: ModuleType) -> None:
    four = [*BASE, 1.1]
    longer = publish.STUDIES["longer"]
    tables = [
        publish.Table(recipe, "steps", results(dit=shifted(-0.1, four), seq=four), ("curves.png",), longer)
        for recipe in publish.RECIPES
    ]
    page = publish.page(tables, "ranking/longer")
    assert page.count("| dit better than seq | confirmed | confirmed | **confirmed** |") == 1
    assert "seq better than parallel" not in page and "each with 4 seeds" in " ".join(page.split())
    assert "larger.sh ranking longer\n" in page and "ranking/longer --study longer\n" in page
    assert "(longer-demo-steps-curves.png)" in page and "(longer-published-steps-curves.png)" in page


def test_real_runs_and_a_folder_without_any(publish: ModuleType, stdit: Callable, tmp_path: Path, capfd) -> None:
    tiny = ["global_batch=2", "data.clips=4", "data.frames=4", "data.height=32", "data.width=32", "model.depth=1"]
    tiny += ["model.hidden_size=32", "sampling.steps=2", "checkpoint_every=1000"]
    options = [part for value in tiny for part in ("--set", value)]
    command = ["ablate", "--variants", "dit,seq", "--steps", "10", "--seeds", "2", "--prompts", "1", *options]
    done = stdit(*command, "--out", "ranking/demo-steps")
    assert done.code == 0, done
    assert publish.main([str(tmp_path / "ranking"), "--out", str(tmp_path / "page")]) == 0
    assert "demo-steps: 4 runs" in capfd.readouterr().out
    page = (tmp_path / "page" / "results.md").read_text()
    assert page.count("Not run yet.") == 3
    assert "| dit better than seq | not run yet |" in page
    assert "| dit | 2 |" in page and "| dit - seq |" in page
    found = publish.read_table(tmp_path / "ranking", "demo", "steps")
    assert [step for step, _ in found.results[0].curve] == list(range(1, 11))
    for name in ("demo-steps.csv", "demo-steps-differences.csv", "demo-steps-curves.png"):
        assert (tmp_path / "page" / name).stat().st_size > 0
    assert publish.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "page")]) == 2
    assert "no finished runs" in capfd.readouterr().err

    config = tmp_path / "ranking" / "demo-steps" / "seq-seed1" / "config.json"
    config.write_text(config.read_text().replace('"global_batch": 2', '"global_batch": 4'))
    assert publish.main([str(tmp_path / "ranking"), "--out", str(tmp_path / "page")]) == 2
    assert "dit-seed0 differ in global_batch" in capfd.readouterr().err


def test_the_best_rate_of_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from best_rate import best_rate

    file = tmp_path / "runs.csv"
    rows = ["seq-lr=0.1,0.5", "dit-lr=0.1,0.9", "seq-lr=0.2,0.6", "dit-lr=0.2,0.7"]
    file.write_text("\n".join(["arm,validation_loss", *rows]))
    assert best_rate(file) == "0.2"
    file.write_text("\n".join(["arm,validation_loss", *rows[:3]]))
    with pytest.raises(SystemExit, match="let the sweep finish"):
        best_rate(file)
