"""`stdit sample` beyond the first video: sidecars, prompts from files, formats, given frames, long clips."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.command import make_request
from stdit_cli.commands.sample.outputs import plan_jobs, sidecar_path, unique_path
from stdit_cli.commands.sample.prompts import read_prompts
from stdit_cli.commands.sample.request import PromptRequest, SampleRequest, Settings
from stdit_cli.commands.sample.run import in_order, share_of, write_sheet
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.preview import contact_sheet
from stdit_data.video.read import read_video
from stdit_data.video.write import write_mp4, write_png
from stdit_train.assets import demo_folder
from stdit_train.distributed.world import DistributedWorld

RED = "a red circle staying still"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_sidecar_tells_all_and_makes_it_again(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("sample", RED, "--num", "3", "--batch", "2", "--steps", "2", "--guidance-interval", "0.5,1")
    assert done.code == 0, done
    made = tmp_path / "videos" / "a-red-circle-staying-still-1.mp4"
    said = json.loads(sidecar_path(made).read_text())
    assert (said["prompt"], said["seed"], said["batch"]["index"]) == (RED, 1, 1)
    wanted = {"frames": 16, "size": "64x64", "fps": 8.0, "steps": 2, "guidance": 1.7, "guidance_interval": "0.5,1"}
    assert wanted.items() <= said["settings"].items()
    (weights,) = (demo_folder() / "transformer").glob("*.safetensors")
    assert said["checkpoint"] == {"source": "demo", "sha256": sha256(weights)}
    assert said["versions"]["torch"] == torch.__version__

    done = stdit("sample", "--from", made, "--out", "again.mp4")  # the video's name stands for the sidecar's
    assert done.code == 0, done
    assert sha256(tmp_path / "again.mp4") == sha256(made)
    assert "warning" not in done.out

    said["checkpoint"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(said))
    done = stdit("sample", "--from", "other.json", "--seed", "0", "--steps", "1", "--out", "new.mp4")
    assert done.code == 0, done
    again = json.loads((tmp_path / "new.mp4.json").read_text())
    assert (again["seed"], again["settings"]["steps"], again["prompt"]) == (0, 1, RED)


def test_other_weights_are_said(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", RED, "--steps", "1", "--out", "a.mp4").code == 0
    said = json.loads((tmp_path / "a.mp4.json").read_text())
    said["checkpoint"]["sha256"] = "0" * 64
    (tmp_path / "a.mp4.json").write_text(json.dumps(said))
    done = stdit("sample", "--from", "a.mp4.json", "--out", "b.mp4")
    assert "other weights" in done.out, done
    (tmp_path / "a.mp4.json").write_text("{}")
    done = stdit("sample", "--from", "a.mp4.json")
    assert done.code == 2
    assert "not the sidecar" in done.err


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["settings"], [], "not the sidecar"),
        (["batch"], {}, "not the sidecar"),
        (["batch", "index"], 7, "not the sidecar"),
        (["made_on"], None, "not the sidecar"),
        (["prompt"], 5, "not the sidecar"),
        (["settings", "steps"], "x", "steps 'x': expected int"),
        (["settings", "size"], 64, "size 64: expected str"),
        (["settings", "nonsense"], 1, "unknown settings: nonsense"),
    ],
)
def test_a_garbled_sidecar_is_told(stdit: Callable, tmp_path: Path, path: list[str], value: object, said: str) -> None:
    content: dict = {
        "prompt": RED, "negative": None, "seed": 0, "settings": {"steps": 1},
        "batch": {"index": 0, "videos": [{"prompt": RED, "negative": None, "seed": 0}]},
        "checkpoint": {"source": "demo", "sha256": ""}, "used": {},
        "made_on": {"device": "cpu", "threads": 1}, "versions": {},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert sidecar.read(tmp_path / "a.json") == content
    *inner, last = path
    place = content
    for key in inner:
        place = place[key]
    place[last] = value
    (tmp_path / "a.json").write_text(json.dumps(content))
    done = stdit("sample", "--from", "a.json")
    assert done.code == 2, done
    assert said in done.err


def test_one_of_a_batch_is_made_again_with_little_memory(stdit: Callable, tmp_path: Path) -> None:
    small = ["--frames", "1", "--steps", "1", "--low-memory"]
    assert stdit("sample", RED, "a blue bar staying still", "--batch", "2", *small, "--out", "a").code == 0
    done = stdit("sample", "--from", "a/a-blue-bar-staying-still-0.png", "--out", "b.png")
    assert done.code == 0, done
    assert sha256(tmp_path / "b.png") == sha256(tmp_path / "a" / "a-blue-bar-staying-still-0.png")


def test_another_picture_under_the_same_name_is_said(stdit: Callable, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    assert stdit("sample", RED, "--image", "first.png", "--frames", "2", "--steps", "1", "--out", "a.mp4").code == 0
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "first.png")
    done = stdit("sample", "--from", "a.mp4", "--out", "b.mp4")
    assert "the image that it starts from has changed" in done.out, done


def test_the_batch_and_the_number_change_nothing(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", "a blue bar staying still", RED, "--num", "2", "--batch", "4", "--out", "a",
                 "--format", "frames").code == 0  # fmt: skip
    assert stdit("sample", RED, "--seed", "1", "--out", "b", "--format", "frames").code == 0
    for i in range(16):
        one, other = (
            torch.frombuffer(bytearray(Image.open(tmp_path / folder / "a-red-circle-staying-still-1" / f"{i:04d}.png")
                                       .tobytes()), dtype=torch.uint8).int()
            for folder in "ab"
        )  # fmt: skip
        assert (one - other).abs().max() <= 1


@pytest.mark.parametrize("kind", ["gif", "webp", "frames"])
def test_formats(stdit: Callable, tmp_path: Path, kind: str) -> None:
    done = stdit("sample", RED, "--steps", "1", "--frames", "4", "--format", kind)
    assert done.code == 0, done
    path = tmp_path / "videos" / ("a-red-circle-staying-still-0" + ("" if kind == "frames" else f".{kind}"))
    count = len(list(path.iterdir())) if kind == "frames" else Image.open(path).n_frames
    assert count == 4
    assert (tmp_path / "videos" / f"{path.name}.json").exists()


def test_a_single_frame_is_a_picture_of_any_size(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("sample", RED, "--steps", "1", "--frames", "1", "--size", "50x71", "--out", "x.png")
    assert done.code == 0, done
    assert Image.open(tmp_path / "x.png").size == (71, 50)


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  two  \n")
    assert [want.prompt for want in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    (tmp_path / "p.csv").write_text('path,Caption,seed\na.mp4,"one, with a comma",7\nb.mp4,two,\n')
    assert read_prompts(tmp_path / "p.csv") == [PromptRequest("one, with a comma", 7), PromptRequest("two")]
    (tmp_path / "p.csv").write_text('\ufeffprompt,seed\n"one\nline",7\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv") == [PromptRequest("one\nline", 7)]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "negative": "bad", "seed": 3}\n"two"\n')
    assert read_prompts(tmp_path / "p.jsonl") == [PromptRequest("one", 3, "bad"), PromptRequest("two")]
    (tmp_path / "p.tsv").write_text("prompt\tseed\none, with a comma\t7.0\ntwo\n")  # as pandas writes 7 above a gap
    assert read_prompts(tmp_path / "p.tsv") == [PromptRequest("one, with a comma", 7), PromptRequest("two")]
    (tmp_path / "p.jsonl").write_text('{" Prompt": "one", "seed ": 7.0, "negative": null}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [PromptRequest("one", 7)]
    long = "a red circle " * 20_000
    (tmp_path / "p.csv").write_text(f'prompt\n"{long}"\n')
    assert read_prompts(tmp_path / "p.csv") == [PromptRequest(long.strip())]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c"])
def test_prompts_end_at_newlines_alone(tmp_path: Path, character: str) -> None:
    prompt = f"a red circle{character}moving left"
    (tmp_path / "p.txt").write_bytes(f"{prompt}\r\na blue square\n".encode())
    (tmp_path / "p.csv").write_bytes(f"prompt\n{prompt}\r\na blue square\n".encode())
    (tmp_path / "p.jsonl").write_bytes((json.dumps(prompt, ensure_ascii=False) + '\n"a blue square"\n').encode())
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert [given.prompt for given in read_prompts(tmp_path / name)] == [prompt, "a blue square"], name


def test_comments_in_text_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# shapes\na red circle\n#\n  \n#1 in the charts\n")
    assert [given.prompt for given in read_prompts(tmp_path / "p.txt")] == ["a red circle", "#1 in the charts"]


def test_several_files_of_prompts_and_an_empty_negative(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    request = make_request(["first"], [tmp_path / "a.txt", tmp_path / "b.txt"], None, {}, {"negative": " "})
    assert [given.prompt for given in request.prompts] == ["first", "a", "b"]
    assert request.negative is None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", " \n", "no prompts"),
        ("p.csv", "path,words\na,b\n", "no column prompt"),
        ("p.csv", "prompt\none\n\"\"\n", "line 3"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": \n', "line 2"),
        ("p.jsonl", '{"prompt": "one", "seed": -1}\n', "line 1: seed is -1; expected a whole number from 0"),
        ("p.jsonl", '{"prompt": "one", "seed": 1.5}\n', "seed is 1.5"),
        ("p.jsonl", '{"prompt": "one", "seed": 9223372036854775808}\n', "from 0 to 9223372036854775807"),
        ("p.csv", "prompt\none, two\n", "line 2: more values .* quotes"),
        ("p.csv", 'prompt\n"so he said\na red circle\na blue square\n', "line 2: a quote that is not closed"),
        ("p.csv", 'prompt,seed\none,1\n"Stop!" he cries,2\n', "line 3: a quote"),
        ("p.csv", "prompt\none\nNaN\n", "line 3: prompt is 'NaN', a missing value"),
        ("p.txt", "one\n\nNone\n", "line 3: prompt is 'None', a missing value"),
        ("p.jsonl", '"one"\n{"prompt": ["a", "b"]}\n', "line 2: prompt is a list; expected text"),
        ("p.jsonl", '{"prompt": "one", "seed": true}\n', "seed is true"),
        ("p.jsonl", '{"prompt": "one", "negative": {"a": 1}}\n', "negative is an object; expected text"),
        ("p.jsonl", '{"prompt": "half \\ud83d"}\n', "prompt is not UTF-8 text at character 6"),
        ("p.jsonl", "[1]\n", "line 1: found a list; expected an object or a string"),
        ("p.jsonl", "[" * 100_000, "line 1: "),
        ("p.doc", "one", ".txt, .csv or .jsonl"),
    ],
)  # fmt: skip
def test_faults_of_prompt_files_name_the_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


def test_names_are_planned_alike_by_every_process(tmp_path: Path) -> None:
    request = SampleRequest(
        [PromptRequest("a cat"), PromptRequest("a cat"), PromptRequest("a dog", seed=5)],
        Settings(),
        num=2,
        out=tmp_path,
    )
    jobs = plan_jobs(request, "mp4")
    names = [job.path.name for job in jobs]
    assert names == ["a-cat-0.mp4", "a-cat-1.mp4", "a-cat-0-2.mp4", "a-cat-1-2.mp4", "a-dog-5.mp4", "a-dog-6.mp4"]
    shares = [share_of(jobs, DistributedWorld(rank, 4)) for rank in range(4)]
    assert sorted(map(len, shares)) == [1, 1, 2, 2]
    assert sorted(job.path for share in shares for job in share) == sorted(job.path for job in jobs)
    assert in_order(shares) == jobs  # the contact sheet is in the order of the prompts
    (tmp_path / "a-cat-0.mp4.json").write_text("{}")  # another video's sidecar is not to be replaced either
    assert unique_path(jobs[0].path, overwrite=False).name == "a-cat-0-2.mp4"
    assert unique_path(jobs[0].path, overwrite=True) == jobs[0].path


def test_a_picture_to_begin_with(stdit: Callable, tmp_path: Path) -> None:
    clip = ShapesDataset(frames=4, height=64, width=64).load(2)
    write_png(tmp_path / "first.png", clip.video[:, :1])
    done = stdit("sample", clip.caption, "--image", "first.png", "--steps", "2", "--format", "frames", "--out", "o")
    assert done.code == 0, done
    (folder,) = [path for path in (tmp_path / "o").iterdir() if path.is_dir()]
    files = sorted(folder.iterdir())
    assert len(files) == 16
    assert Image.open(files[0]).tobytes() == Image.open(tmp_path / "first.png").tobytes()
    assert Image.open(files[1]).tobytes() != Image.open(tmp_path / "first.png").tobytes()


def test_footage_that_the_vae_does_not_know_is_said(stdit: Callable, tmp_path: Path) -> None:
    across, down = torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64)[:, None]
    picture = torch.stack([across * down, (9 * across).sin().expand(64, 64), (5 * down + across).cos()])[:, None]
    write_png(tmp_path / "photo.png", picture)
    write_mp4(tmp_path / "photo.mp4", picture.expand(-1, 12, -1, -1), 8)
    write_png(tmp_path / "shape.png", ShapesDataset(split="val").load(3).video[:, :1])
    for option, file, poor in (("--image", "photo.png", 1), ("--video", "photo.mp4", 1), ("--image", "shape.png", 0)):
        done = stdit("sample", RED, option, file, "--steps", "1", "--overwrite")
        assert done.code == 0, done
        assert done.out.count("given frames that its VAE turns into blobs") == poor
        assert done.out.count("the demo's VAE knows flat shapes alone") == poor


def test_a_video_to_go_on_from(stdit: Callable, tmp_path: Path) -> None:
    clip = ShapesDataset(frames=20, height=40, width=64).load(1)
    write_mp4(tmp_path / "clip.mp4", clip.video, 8, crf=0)
    arguments = ["--video", "clip.mp4", "--extend", "12", "--steps", "2", "--size", "40x64", "--format", "frames"]
    done = stdit("sample", clip.caption, *arguments, "--out", "o")
    assert done.code == 0, done
    (folder,) = [path for path in (tmp_path / "o").iterdir() if path.is_dir()]
    assert len(list(folder.iterdir())) == 32
    given, _ = read_video(str(tmp_path / "clip.mp4"), 40, 64)
    eleventh = torch.frombuffer(bytearray(Image.open(folder / "0011.png").tobytes()), dtype=torch.uint8)
    expected = ((given[:, 11] + 1) * 127.5).round().permute(1, 2, 0).flatten()
    assert (eleventh.float() - expected).abs().max() <= 1
    said = json.loads((tmp_path / "o" / f"{folder.name}.json").read_text())
    assert said["settings"]["video"] == str(tmp_path / "clip.mp4")
    assert said["used"]["frames"] == 32
    assert said["used"]["sampled"] == "20x48x64"  # the last 8 given frames and 12 new ones, at a size that fits


@pytest.mark.parametrize(
    ("how", "said"), [("windows", "in windows of 16"), ("stretch", "40x64x64"), ("whole", "40x64x64")]
)
def test_longer_than_trained(stdit: Callable, tmp_path: Path, how: str, said: str) -> None:
    done = stdit(
        "sample", RED, "--frames", "40", "--steps", "1", "--long", how, "--resampling-steps", "0", "--out", "x.mp4"
    )
    assert done.code == 0, done
    assert said in done.out
    assert read_video(str(tmp_path / "x.mp4"), 64, 64)[0].shape[1] == 40


def test_low_memory_changes_nothing(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", RED, "--steps", "2", "--out", "a.png", "--frames", "1").code == 0
    assert stdit("sample", RED, "--steps", "2", "--out", "b.png", "--frames", "1", "--low-memory").code == 0
    assert sha256(tmp_path / "a.png") == sha256(tmp_path / "b.png")


def test_finished_videos_survive_an_interruption(
    stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stdit_cli.commands.sample.generate import VideoGenerator

    make, calls = VideoGenerator.make, []

    def interrupted(self, batch, on_step):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, batch, on_step)

    monkeypatch.setattr(VideoGenerator, "make", interrupted)
    done = stdit("sample", RED, "--num", "3", "--steps", "1")
    assert done.code == 130
    assert "1 of 3 videos" in done.out
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["a-red-circle-staying-still-0.mp4", "a-red-circle-staying-still-0.mp4.json"]


def test_an_existing_folder_may_have_dots_in_its_name(stdit: Callable, tmp_path: Path) -> None:
    (tmp_path / "run-v1.0").mkdir()
    done = stdit("sample", RED, "--frames", "1", "--steps", "1", "--out", "run-v1.0")
    assert done.code == 0, done
    assert (tmp_path / "run-v1.0" / "a-red-circle-staying-still-0.png").exists()


def test_settling_is_another_spelling_of_resampling_steps(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("sample", RED, "--frames", "1", "--steps", "1", "--settling", "2", "--out", "x.png")
    assert (done.code, done.err.count("--resampling-steps")) == (0, 1), done
    content = json.loads((tmp_path / "x.png.json").read_text())
    assert content["settings"].pop("resampling_steps") == 2
    content["settings"]["settling"] = 2  # as older versions wrote it
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert sidecar.read(tmp_path / "old.json")["settings"]["resampling_steps"] == 2


def test_a_contact_sheet_tells_prompt_seed_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And how many videos it leaves out; an earlier sheet is kept."""
    drawn = {}

    def draw(videos: Any, captions: Any, **options: Any) -> Image.Image:
        drawn.update(options, videos=videos, captions=captions)
        return contact_sheet(videos, captions, **options)

    monkeypatch.setattr("stdit_data.preview.contact_sheet", draw)
    videos = [(f"prompt {i}", f"seed {i}, {i}.png", torch.zeros(3, 1, 8, 8)) for i in range(26)]
    console = Console(soft_wrap=True, highlight=False)
    for _ in range(2):
        write_sheet(console, tmp_path / "contact-sheet.png", False, videos)
    assert (drawn["captions"][-1], drawn["details"][-1], len(drawn["videos"])) == ("prompt 23", "seed 23, 23.png", 24)
    lines = capfd.readouterr().out.splitlines()
    assert [Path(line.split(" (")[0]).name for line in lines] == ["contact-sheet.png", "contact-sheet-2.png"]
    assert lines[0].endswith("(the first 24 of 26 videos)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact-sheet-2.png", "contact-sheet.png"]
    write_sheet(console, tmp_path / "few.png", False, videos[:2])
    assert capfd.readouterr().out == f"{tmp_path / 'few.png'}\n"
