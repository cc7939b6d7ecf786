"""Every benchmark runs from start to end, with as little as it takes; its numbers mean nothing then."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = {  # with what is in the output
    "caches.py --prompts 1 --reference 2 --steps 4 --caches first-block:0.8 pab:2*": "| none | 4 | 4.00 |",
    "continuation.py demo --clips 1": "speed error",
    "curation.py 200": "| dedup, comparison | 200 | 180 |",
    "data.py manifests --rows 4000 --formats csv": "4000 csv again",
    "data.py memory --clips 40": "repeats for a bad file",
    "data.py seek --rounds 1 --frames 60": "| made, 2 s.mp4, 640x360, 60 frames |",
    "decoders.py --frames 60 --size 160 96 --rounds 1": "| 1.00 | 16 of 16 | 0.00 |",
    "distributed.py": "| 1440x512 | 512 |",
    "latents.py read --gib 0.02 --rounds 1": "| in memory |",
    "latents.py step --steps 1 --batch 1 --side 16": "| a step, s |",
    "long_videos.py --frames 24 --prompts 1": "1 videos of 24 frames",
    "lora.py clips chameleon --count 2": "2 clips in chameleon",
    "model.py --width 48 --heads 4 --depth 2 --frames 2 --size 8 --rounds 1 --threads 1": "| Latte (diffusers) |",
    "samplers.py --prompts 1 --steps 1 --samplers unipc": "| 1 | unipc |",
}
ELSEWHERE = {  # the files of the other tests that run a benchmark
    "ablation/best_rate.py": "test_publish.py",
    "ablation/publish.py": "test_publish.py",
    "findings/iddpm.py": "test_iddpm.py",
    "findings/run.py": "test_findings.py",
    "findings/spoiled.py": "test_spoiled.py",
    "findings/temporal_vae.py": "test_temporal_vae.py",
    "gpu/__main__.py": "test_gpu.py",
}
NEEDS_PEERS = {"latent_peers.py"}  # that are installed for it alone


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_a_tiny_run(command: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # not at the top: the other tests here start processes of their own

    torch.set_num_threads(1)
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert COMMANDS[command] in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cold_start.py --runs 1 --rows", "| `stdit --help` |"),
        ("cost.py --frames 2 --variants seq dit --width 24 --depth 1 --repeats 1 --rounds 1 --out", "| 2 | 32 | dit |"),
    ],
    ids=["cold_start.py", "cost.py"],
)
def test_a_tiny_run_of_processes(command: str, said: str, tmp_path: Path) -> None:
    """Of those that start processes of their own, which must not be forks of this one with its threads."""
    script, *arguments = command.split()
    last = "stdit --help" if script == "cold_start.py" else str(tmp_path / "cost")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, last], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_no_benchmark_is_left_out() -> None:
    here = {command.split()[0] for command in COMMANDS} | {"cold_start.py", "cost.py"}
    scripts = {
        str(file.relative_to(BENCHMARKS))
        for file in BENCHMARKS.rglob("*.py")
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }
    assert scripts == here | set(ELSEWHERE) | NEEDS_PEERS
    for script, test in ELSEWHERE.items():
        assert Path(script).stem.strip("_") in (Path(__file__).parent / test).read_text(encoding="utf-8")
