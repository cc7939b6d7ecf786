"""Public sets' metadata to manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stdit_data.errors import DataError
from stdit_data.manifests.converters import hdvg, pexels, ucf101
from stdit_data.manifests.format import Entry, read_manifest

HDVG = {
    "abc": {
        "clip": {
            "abc_0.mp4": {
                "scene_split": [
                    {"clip_id": "abc_0_0", "caption": "a dog  runs", "scene_cut": [0, 61]},
                    {"clip_id": "abc_0_1", "caption": "a cat", "scene_cut": [61, -1]},
                    {"clip_id": "abc_0_2", "scene_cut": [3, 4]},
                    {"clip_id": "abc_0_3", "caption": "cut wrong", "scene_cut": [9, 4]},
                    {"clip_id": "abc_0_4", "caption": "", "scene_cut": [0, 4]},
                ]
            },
            "abc_1.mp4": {"scene_split": [{"caption": "a bird", "scene_cut": [0, -1]}]},
            "abc_2.mp4": {},
        }
    },
    "def": {"title": "no clips"},
}


def test_hdvg(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(HDVG))
    done = hdvg.convert(str(tmp_path / "meta.json"))
    source = {"source": "HD-VG-130M, YouTube abc", "licence": hdvg.LICENCE}
    assert done.entries == [
        Entry("abc_0.mp4", "a dog runs", end_frame=61, **source),
        Entry("abc_0.mp4", "a cat", start_frame=61, **source),
        Entry("abc_1.mp4", "a bird", **source),
    ]
    assert dict(done.skipped) == {
        "key 'caption' missing": 1,
        "scene_cut is not [start, end] in frames": 1,
        "empty caption": 1,
        "key 'scene_split' missing": 1,
        "key 'clip' missing": 1,
    }


def test_hdvg_of_what_was_downloaded(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(HDVG))
    (tmp_path / "videos/part1").mkdir(parents=True)
    (tmp_path / "videos/part1/abc_1.mp4").touch()
    done = hdvg.convert(str(tmp_path / "meta.json"), videos=str(tmp_path / "videos"))
    assert [entry.path for entry in done.entries] == ["part1/abc_1.mp4"]
    assert done.skipped["clip not in the folder"] == 5
    out = str(tmp_path / "set.jsonl")
    assert done.write(out, folder=str(tmp_path / "videos")) == 1
    manifest = read_manifest(out)
    assert manifest.entries[0].path == "videos/part1/abc_1.mp4"  # relative, so the whole can be moved
    elsewhere = tmp_path / "elsewhere" / "set.jsonl"
    done.write(str(elsewhere), folder=str(tmp_path / "videos"))
    assert read_manifest(str(elsewhere)).entries[0].path == str(tmp_path / "videos/part1/abc_1.mp4")


def test_hdvg_of_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"abc": {"clips": {}}}')
    with pytest.raises(DataError, match=r"nothing to write \(1 x key 'clip' missing"):
        hdvg.convert(str(tmp_path / "meta.json")).write(str(tmp_path / "out.csv"))
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(DataError, match="list; expected one JSON object keyed by YouTube id"):
        hdvg.convert(str(tmp_path / "meta.json"))
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json: not JSON"):
        hdvg.convert(str(tmp_path / "meta.json"))
    with pytest.raises(DataError, match=r"none.json: no such file"):
        hdvg.convert(str(tmp_path / "none.json"))


@pytest.mark.parametrize("captions", [
    {"1-waves.mp4": "Waves.", "sub/2.forest": "A forest.", "9": "Lost."},
    [{"video": "1-waves.mp4", "caption": "Waves."}, {"id": "2.forest", "text": "A forest."}, {"id": 9, "text": "x"}],
    "path,caption\n1-waves.mp4,Waves.\n2.forest.mp4,A forest.\n9.mp4,Lost.\n",
])  # fmt: skip
def test_pexels(tmp_path: Path, captions: object) -> None:
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name in ("1-waves.mp4", "sub/2.forest.mp4", "3.mp4"):
        (folder / name).touch()
    file = tmp_path / ("captions.csv" if isinstance(captions, str) else "captions.json")
    file.write_text(captions if isinstance(captions, str) else json.dumps(captions))
    done = pexels.convert(str(folder), captions=str(file))
    assert [(entry.path, entry.caption) for entry in done.entries] == [
        ("1-waves.mp4", "Waves."),
        ("sub/2.forest.mp4", "A forest."),
    ]
    assert dict(done.skipped) == {"video without a caption": 1, "caption without a video": 1}


def test_pexels_with_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("Waves.")
    assert [entry.caption for entry in pexels.convert(str(tmp_path)).entries] == ["Waves."]
    (tmp_path / "captions.json").write_text('{"a.mp4": 3}')
    with pytest.raises(DataError, match=r"'a.mp4' has 3; expected a name and a caption"):
        pexels.convert(str(tmp_path), captions=str(tmp_path / "captions.json"))


def test_ucf101(tmp_path: Path) -> None:
    names = ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g02_c03.avi", "YoYo/other.avi")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = ucf101.convert(str(tmp_path), template="A person: {action}")
    assert [entry.caption for entry in done.entries] == ["A person: apply eye makeup", "A person: yo yo"]
    assert dict(done.skipped) == {"not named v_Action_gNN_cNN": 1}
    (tmp_path / "trainlist01.txt").write_text("YoYo/v_YoYo_g02_c03.avi 101\n")
    done = ucf101.convert(str(tmp_path), split=str(tmp_path / "trainlist01.txt"))
    assert [(entry.path, entry.caption) for entry in done.entries] == [("YoYo/v_YoYo_g02_c03.avi", "yo yo")]
    with pytest.raises(DataError, match=r"expected \{action\} in it"):
        ucf101.convert(str(tmp_path), template="action")
    with pytest.raises(DataError, match=r"none.txt: no such list"):
        ucf101.convert(str(tmp_path), split=str(tmp_path / "none.txt"))
