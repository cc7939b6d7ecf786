"""What a user can get wrong ends in one clear line on stderr, exit code 2, and no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.core import TyperGroup

from stdit_cli import main
from stdit_cli.main import as_options
from stdit_train.assets import demo_folder
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import load_stage, parse_overrides, write_curriculum
from stdit_train.curriculum import TrainOptions, find_run
from stdit_train.errors import ConfigError


def check(done, *said: str) -> None:
    assert done.code == 2, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err + done.out
    for text in said:
        assert text in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--stage", "64x51"], ["unknown stage '64x51'", "64x512"]),
        (["train", "--set", "optimizer.lrr=1"], ["optimizer.lrr", "optimizer.lr"]),
        (["train", "--set", "steps"], ["key=value"]),
        (["train", "--variant", "dot"], ["model.variant", "seq"]),
        (["train", "--data", "nowhere"], ["nowhere"]),
        (["train", "--stage", "demo", "--schedule", "demo"], ["--stage and --curriculum", "give one"]),
        (["train", "--resume"], ["nothing to resume"]),
        (["train", "--vae", "./none"], ["./none", "--vae"]),
        (["train", "--text-encoder", "none/such"], ["none/such", "--text-encoder"]),
        (["train", "--init", "./none.pth"], ["none.pth"]),
        (["sample", ""], ["prompt is empty"]),
        (["sample", "a red circle", "  "], ["prompt is empty"]),
        (["sample", "a red circle", "--size", "64x"], ["--size 64x", "HEIGHTxWIDTH"]),
        (["sample"], ["no prompt"]),
        (["sample", "x", "--prompts", "none.txt"], ["none.txt", "no such file"]),
        (["sample", "x", "--prompts", "none.pdf"], ["none.pdf", "no such file"]),
        (["sample", "--from", "none.json"], ["none.json", "no such file"]),
        (["sample", "x", "--compat", "open-sora-9"], ["open-sora-9", "open-sora-1.0"]),
        (["sample", "x", "--compat", "open-sora-1.0"], ["ddpm", "rectified flow"]),
        (["sample", "x", "--long", "wide"], ["--long wide", "windows"]),
        (["sample", "x", "--guidance-interval", "0.5"], ["--guidance-interval 0.5", "0.1,0.7"]),
        (["sample", "x", "--guidance-rescale", "2"], ["--guidance-rescale", "0 to 1"]),
        (["sample", "x", "--image", "none.png"], ["--image none.png", "no such file"]),
        (["sample", "x", "--image", "none.png", "--frames", "1"], ["--image and --frames 1"]),
        (["sample", "x", "--guidance", "nan"], ["--guidance nan", "a finite number"]),
        (["sample", "x", "--extend", "8"], ["--extend", "--video"]),
        (["sample", "x", "--frames", "32", "--overlap", "16"], ["--overlap 16", "1 to 15"]),
        (["sample", "x", "--format", "avi"], ["--format avi", "mp4, gif"]),
        (["sample", "x", "--format", "gif", "--out", "x.mp4"], ["x.mp4", "gif"]),
        (["sample", "x", "--format", "png"], ["png", "one frame"]),
        (["sample", "x", "--vae", "none/such"], ["none/such", "hf download none/such", "--vae"]),
        (["sample", "x", "--vae", "./none"], ["./none", "vae"]),
        (["sample", "x", "--text-encoder", "none/such"], ["none/such", "hf download", "--text-encoder"]),
        (["sample", "x", "--text-8bit"], ["--text-8bit", "bitsandbytes"]),
        (["sample", "x", "--text-8bit", "--low-memory"], ["bitsandbytes"]),
        (
            ["sample", "x", "--checkpoint", "none/such/weights.pth"],
            ["hf download none/such weights.pth --local-dir such", "pass such/weights.pth"],
        ),
        (["sample", "a red circle", "--checkpoint", "./none"], ["./none"]),
        (
            ["sample", "a red circle", "--checkpoint", "none/such"],
            ["none/such", "HF_HUB_OFFLINE is set", "hf download none/such"],
        ),
        (["sample", "a red circle", "--sampler", "ddpm"], ["ddpm", "euler"]),
        (["sample", "a red circle", "--out", "x.avi"], ["x.avi", ".mp4"]),
        (["sample", "a red circle", "--num", "2", "--out", "x.mp4"], ["x.mp4", "folder"]),
        (["eval", "--split", "new"], ["--split new", "held-out"]),
        (["ablate", "--variants", "dit,sec"], ["'sec'", "seq"]),
        (["ablate", "--stage", "vae-demo-video"], ["STDiTs, not VAEs", "--stage"]),
        (
            ["ablate", "--stage", "vae-demo-video", "--set", "network=stdit", "--vary", "network=stdit,vae"],
            ["STDiTs, not VAEs", "network=vae"],
        ),
    ],
)
def test_one_line(stdit: Callable, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]) -> None:
    monkeypatch.setattr("stdit_train.hardware.available_memory", lambda: 2**40)  # what this machine has does not matter
    check(stdit(*arguments), *said)


@pytest.mark.parametrize(
    ("run", "arguments", "said"),
    [
        ("run", ["--init", "demo"], "leave out --init demo"),
        ("run", ["--set", "init=other"], "leave out --init other"),
        ("run", [], None),
        ("from-demo", [], None),
        ("from-demo", ["--init", "demo"], None),  # as it began
        ("from-demo", ["--init", "other"], "leave out --init other"),
        ("curriculum", ["--init", "other"], "leave out --init other"),
        ("curriculum", ["--set", "demo/init=other"], "leave out --init other"),
        ("curriculum", [], None),
        ("adapter", ["--init", "other"], None),  # the frozen weights have moved
    ],
)
def test_a_resumed_run_keeps_its_initial_weights(
    tmp_path: Path, run: str, arguments: list[str], said: str | None
) -> None:
    folder = tmp_path / run
    if run == "curriculum":
        write_curriculum(folder, "shapes-progressive", [load_stage("demo", {"init": "demo"}), load_stage("16x256")])
    else:
        settings = {"run": {}, "from-demo": {"init": "demo"}, "adapter": {"init": "demo", "lora.rank": 2}}[run]
        RunFolder(folder).create(load_stage("demo", settings))
    given = parse_overrides(["init=" + arguments[1]] if arguments[:1] == ["--init"] else arguments[1:])
    options = TrainOptions(overrides=given, resume=str(folder))
    if said is None:
        saved = find_run(replace(options, overrides={}))
        assert [config.stage for config in find_run(options).configs] == [config.stage for config in saved.configs]
        return
    with pytest.raises(ConfigError, match=f"{folder}: {said}"):
        find_run(options)


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--stge", "demo"], ["sample", "x", "--num", "0"]])
def test_a_wrong_word_is_explained(stdit: Callable, arguments: list[str]) -> None:
    done = stdit(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "Usage" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "nowhere: no such folder or manifest"),
        (["--data", "none.csv"], "none.csv: no such manifest"),
        (["--data", "clip.mp4"], "clip.mp4: expected a folder or a manifest"),
        (["--init", "none.pth"], "none.pth: no such file or folder"),
        (["--stage", "64x512", "--data", "none.csv"], "none.csv"),  # before VAE and text encoder are looked for
    ],
)
def test_files_of_a_run_are_looked_for_before_anything_is_said(
    stdit: Callable, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"junk")
    done = stdit("train", *arguments)
    check(done, said)
    assert done.out == ""


@pytest.mark.parametrize("arguments", [["--init", "demo"], ["--set", "init=demo"]])
def test_other_initial_weights_for_a_resumed_run(stdit: Callable, tmp_path: Path, arguments: list[str]) -> None:
    RunFolder(tmp_path / "run").create(load_stage("demo"))
    check(stdit("train", "--resume", "run", *arguments), "continues with the weights of run: leave out --init demo")
    assert RunFolder(tmp_path / "run").read_config()["init"] is None


@pytest.mark.parametrize(
    ("part", "option", "said"),
    [
        ("text_encoder", "vae", "text_encoder is no VAE, its config.json is of T5EncoderModel: give a VAE"),
        ("transformer", "vae", "transformer is no VAE, its config.json is of STDiT: give a VAE"),
        ("vae", "text_encoder", "vae is no text encoder, its config.json is of AutoencoderKL: give a text encoder"),
    ],
)
def test_a_part_in_the_place_of_another(stdit: Callable, part: str, option: str, said: str) -> None:
    folder, named = demo_folder() / part, f"--{option.replace('_', '-')}"
    done = stdit("train", named, folder)
    check(done, f"{said} with {named}")
    assert done.out == ""
    for command in (["plan"], ["train", "--dry-run"]):
        check(stdit(*command, "--set", f"data.{option}={folder}"), f"{said} with --set data.{option}=...")


def test_a_run_folder_that_cannot_be_made(stdit: Callable) -> None:
    check(stdit("train", "--out", "/proc/x"), "/proc/x cannot be written to", "choose another folder with --out")


def test_an_empty_data_folder(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/notes.txt").touch()
    done = stdit("train", "--data", "clips")
    check(done, "clips: no videos")
    assert done.out == ""  # no warning of the demo's VAE first
    assert not (tmp_path / "runs").exists()


def test_a_manifest_without_the_columns(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("clip,words,fps\na.mp4,hello,3\n")
    check(stdit("train", "--data", "m.csv"), "m.csv", "path")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_checkpoint_with_a_part_missing(stdit: Callable, tmp_path: Path, part: str) -> None:
    shutil.copytree(demo_folder(), tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / part)
    check(stdit("sample", "a red circle", "--checkpoint", "broken"), part)


def test_a_truncated_weight_file(stdit: Callable, tmp_path: Path) -> None:
    shutil.copytree(demo_folder(), tmp_path / "broken")
    file = next((tmp_path / "broken" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    check(stdit("sample", "a red circle", "--checkpoint", "broken"), file.name)


def test_a_run_without_a_pipeline(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    check(stdit("sample", "a red circle", "--checkpoint", "run"), "no pipeline yet")


def test_a_missing_component_is_told_before_a_lack_of_memory(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit_train.hardware.available_memory", lambda: 2**24)
    check(stdit("train", "--text-encoder", "none/such"), "cannot load the text encoder 'none/such'", "--text-encoder")
    check(stdit("train", "--vae", "./none"), "no VAE at ./none")


def test_a_stage_too_large_for_this_machine(stdit: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stdit_train.hardware.available_memory", lambda: 2**32)
    check(stdit("train", "--stage", "64x512"), "64x512", "GiB", "--set")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_before_there_is_anything_to_save(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stdit_train.build.open_trainer", interrupted)
    monkeypatch.setattr("stdit_data.manifests.format.read_manifest", interrupted)
    for command in (["train", "--stage", "demo", "--out", "run"], ["data", "validate", "clips.csv"]):
        done = stdit(*command)
        assert (done.code, done.err) == (130, "stdit: interrupted\n"), command


def test_debug_shows_where_it_came_from() -> None:
    command = [sys.executable, "-c", "from stdit_cli.main import main; main()", "train", "--stage", "none", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data", "encode", "shapes", "out", "--size", "64x64"], "No such option: --size: give --height and --width"),
        (["train", "--size", "64"], "--size: give --set data.height=... and --set data.width=..."),
        (["plan", "--hidden-size", "64"], "--hidden-size: give --set model.hidden_size=..."),
        (["train", "--hight", "64"], "No such option: --hight"),
    ],
)
def test_an_unknown_option_that_is_a_setting_names_it(arguments: list[str], said: str, stdit: Callable) -> None:
    done = stdit(*arguments)
    assert done.code == 2
    assert said in done.err


def test_arguments_that_messages_name_are_shown_as_options() -> None:
    assert as_options("no captioner: give `model=PATH`, or `text_encoder=google/t5`") == (
        "no captioner: give --model PATH, or --text-encoder google/t5"
    )
    assert as_options("`partly=True` applies the rest") == "--partly applies the rest"
    said = "run `stdit data encode`, `hf download a --local-dir b`, or --set optimizer.lr=1"
    assert as_options(said) == said


@pytest.mark.parametrize("name", main.Commands.lazy)
def test_the_help_of_all_commands_is_that_of_each(name: str) -> None:
    lazy = main.Commands.lazy[name]
    command = lazy.load(name)
    assert command.name == name
    assert " ".join(command.help.split("\n\n")[0].split()) == lazy.summary
    assert isinstance(command, lazy.cls if ":app" not in lazy.place else TyperGroup)


def test_help_imports_neither_torch_nor_pydantic_nor_the_commands() -> None:
    script = """
        import json, sys
        sys.argv = ["stdit", "--help"]
        from stdit_cli.main import main
        try:
            main()
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "pydantic", "numpy", "diffusers", "transformers", "av", "matplotlib", "fsspec"}
        heavy |= {name for name in sys.modules if name.startswith("stdit_cli.commands")}
        print(json.dumps(sorted(heavy & set(sys.modules))))
    """
    import textwrap

    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "Commands" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_what_a_name_tells_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.toml").write_text("= = [")
    commands = [
        ["sample", "x", "--checkpoint", "none/such"],
        ["sample", "x", "--checkpoint", "nowhere"],
        ["sample", "x", "--checkpoint", "empty"],
        ["sample", "x", "--image", "notes.md"],
        ["sample", "x", "--vae", "none/such"],
        ["sample", "x", "--text-encoder", "none/such"],
        ["sample", "x", "--frames", "32", "--overlap", "16"],
        ["sample", "x", "--sampler", "ddpm"],
        ["sample", "x", "--lora", "nowhere"],
        ["sample", "x", "--lora", "none/such"],
        ["sample", "x", "--video", "nowhere.mp4"],
        ["sample", "x", "--prompts", "nowhere.txt"],
        ["sample", "--from", "nowhere.mp4"],
        ["sample", "x", "--out", "notes.md/x.mp4"],
        ["train", "--data", "nowhere"],
        ["train", "--data", "nowhere.csv"],
        ["train", "--data", "notes.md"],
        ["train", "--data", "empty"],
        ["train", "--init", "nowhere"],
        ["train", "--init", "none/such"],
        ["train", "--lora", "4", "--init", "nowhere"],
        ["train", "--resume", "nowhere"],
        ["train", "--resume", "empty"],
        ["train", "--resume"],
        ["train", "--vae", "nowhere"],
        ["train", "--vae", "none/such"],
        ["train", "--text-encoder", "none/such"],
        ["train", "--vae", str(demo_folder() / "transformer")],
        ["train", "--text-encoder", str(demo_folder() / "vae")],
        ["train", "--stage", "nowhere"],
        ["train", "--stage", "vae-demo-image", "--init", "nowhere"],
        ["train", "--curriculum", "nowhere"],
        ["train", "--config", "nowhere.toml"],
        ["train", "--config", "junk.toml"],
        ["train", "--set", "nowhere=1"],
        ["train", "--set", "optimizer.lr=-1"],
        ["train", "--out", "notes.md"],
        ["train", "--out", "notes.md/run"],
        ["train", "--batch", "3", "--nproc", "2"],
        ["train", "--dry-run", "--gpu", "h10"],
        ["plan", "--stage", "nowhere"],
        ["plan", "--gpu", "h10"],
        ["plan", "--set", "nowhere=1"],
        ["plan", "--json", "--sampling"],
        ["ablate", "--stage", "nowhere"],
        ["ablate", "--stage", "vae-demo-video", "--steps", "1", "--seeds", "1", "--prompts", "0"],
        ["ablate", "--vary", "nowhere=1,2"],
        ["ablate", "--out", "notes.md"],
        ["eval", "none/such"],
        ["eval", "nowhere"],
        ["eval", "--data", "nowhere"],
        ["eval", "--out", "nowhere/scores.json"],
        ["export", "nowhere", "out"],
        ["export", "empty", "out"],
        ["report", "nowhere"],
        ["report", "empty"],
        ["weights", "inspect", "nowhere.pth"],
        ["weights", "inspect", "none/such"],
        ["weights", "convert", "nowhere.pth", "out"],
        ["weights", "merge", "nowhere", "out", "--lora", "x"],
        ["weights", "merge", "demo", "out", "--lora", "nowhere"],
        ["data", "validate", "nowhere"],
        ["data", "preview", "nowhere.csv"],
        ["data", "encode", "nowhere", "out"],
        ["data", "encode", "shapes", "out", "--stage", "nowhere"],
        ["data", "inspect", "nowhere"],
        ["data", "filter", "nowhere.csv", "out.parquet", "--keep", "x > 1"],
        ["data", "convert", "hdvg", "nowhere", "out.csv"],
        ["data", "convert", "pexels", "nowhere", "out.csv"],
        ["data", "convert", "ucf101", "nowhere", "out.csv"],
    ]
    script = """
import json, sys
from stdit_cli.main import main
found = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["stdit", *command]
    try:
        main()
    except SystemExit as end:
        heavy = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
        if end.code != 2 or heavy:
            found.append([*command, end.code, *heavy])
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert done.stderr.count("\n") == len(commands)


@pytest.fixture
def wrong_files(tmp_path: Path) -> None:
    """Files and folders that are not what a command expects."""
    for name in ("folder", "folder.json", "pipeline", "list", "run"):
        (tmp_path / name).mkdir()
    for name in ("junk.png", "junk.mp4", "junk.pth", "junk.safetensors", "file"):
        (tmp_path / name).write_bytes(b"junk" * 100)
    (tmp_path / "junk.csv").write_bytes(b"\xff\xfe\x00prompt")
    (tmp_path / "junk.json").write_text("{")
    (tmp_path / "junk.toml").write_text("= = [")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "pipeline" / "model_index.json").write_text("{")
    (tmp_path / "list" / "model_index.json").write_text("[]")
    (tmp_path / "run" / "config.json").write_text("{")
    (tmp_path / "run" / "metrics.jsonl").write_text("{")


@pytest.mark.usefixtures("wrong_files")
@pytest.mark.parametrize(
    "command",
    [
        "sample x --checkpoint folder",
        "sample x --checkpoint junk.pth",
        "sample x --checkpoint junk.safetensors",
        "sample x --checkpoint pipeline",
        "sample x --checkpoint list",
        "sample x --image folder",
        "sample x --image junk.png",
        "sample x --video junk.mp4",
        "sample x --prompts folder",
        "sample x --prompts junk.csv",
        "sample x --prompts list.jsonl",
        "sample --from folder.json",
        "sample --from junk.json",
        "sample x --vae file",
        "sample x --vae folder",
        "sample x --out file",
        "sample x --frames 1 --steps 1 --out file/x.png",
        "train --stage junk.toml",
        "train --data junk.mp4",
        "train --data junk.csv",
        "train --out file",
        "train --resume folder",
        "train --resume run",
        "train --init folder",
        "train --init junk.pth",
        "train --set model.hidden_size=33",
        "train --set model.preset=QQ",
        "train --set data.height=20",
        "plan --gpu abacus",
        "export folder out",
        "export run out",
        "report file",
        "eval folder",
        "eval --data junk.csv",
        "eval --fvd junk.pth",
        "ablate --out file",
        "build-demo file",
        "data preview shapes --out file/x",
        "data encode shapes file",
        "data encode file out",
        "weights convert demo file/out.pth",
    ],
)
def test_what_is_not_what_it_should_be_is_one_line(stdit: Callable, command: str) -> None:
    check(stdit(*(str(demo_folder()) if word == "demo" else word for word in command.split())))


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_too_little_memory_for_a_video(stdit: Callable, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import torch

    def exhausted(self: object, **_: object) -> None:
        if kind == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes.")

    monkeypatch.setattr("stdit_model.STDiTPipeline.__call__", exhausted)
    check(stdit("sample", "a red circle", "--frames", "8"), "not enough memory for 1 x 8x64x64", "--size")
