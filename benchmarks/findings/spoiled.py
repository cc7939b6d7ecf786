"""Put the curation to the test on `shapes`, spoiled on purpose: what each step finds, and whether it helps training.

    uv run python benchmarks/findings/spoiled.py RUN_DIR [--clips 400]
    uv run python benchmarks/findings/spoiled.py RUN_DIR --train [--seeds 3] [--minutes 75] [--prompts 40]

The first command writes the clips, and runs score, filter and dedup over them; the second also trains on all clips, on
those that were kept (also with the captions that a perfect captioner would write), and on those that are not spoiled.
Interrupted at any moment, both can be typed again. Both write curation.md from what there is.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import run as findings  # sets OMP_NUM_THREADS, before torch is imported
import torch
from questions import MINUTES, PROMPTS, SEEDS, Arm, Contrast, Question
from report import read_results, section
from torchvision.transforms.functional import gaussian_blur

from stdit_data.curation.dedup import HashStep, Matching, dedup
from stdit_data.curation.engine import rejects_path, run
from stdit_data.curation.filtering.filter import open_filter
from stdit_data.curation.filtering.presets import load_preset
from stdit_data.curation.score import ScoreStep
from stdit_data.curation.tables import open_rows
from stdit_data.datasets.shapes import ShapesDataset, Split
from stdit_data.errors import DataError
from stdit_data.latents.format import INDEX
from stdit_data.storage.atomic import replace_text
from stdit_data.video.write import write_mp4
from stdit_data.workers.executors import Inline
from stdit_train.components.precompute import Encoding, open_jobs
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, RunEnded

SIDE, FRAMES, FPS = 96, 16, 8.0
CLIPS, HELD = 400, 64  # clips to spoil, and clean ones for the validation loss
SHARES = {"static": 0.2, "wrong caption": 0.2, "duplicate": 0.1, "blurred": 0.05, "letterboxed": 0.05}
FOUND_BY = {  # the reasons that are right for each kind of spoiled clip
    "static": ("motion", "frozen_share"),
    "blurred": ("sharpness",),
    "letterboxed": ("letterbox",),
    "duplicate": ("dedup",),
    "wrong caption": (),
}
BLUR, BAR = 0.04, 0.15  # standard deviation, and height of each of the two bars, as shares of the side
ABOUT = {
    "all": "all clips",
    "kept": "what score, filter and dedup kept",
    "captioned": "what was kept, with true captions",
    "clean": "those that are not spoiled",
}
PAGE = Path(__file__).with_name("curation.md")


def kinds_of(clips: int) -> list[str]:
    """Return what is wrong with each clip, "clean" for most; the same for the same number of clips."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * clips))]
    kinds += ["clean"] * (clips - len(kinds))
    return [kinds[i] for i in np.random.default_rng(0).permutation(clips)]


def write_clips(folder: Path, clips: int) -> Path:
    """Write the clips that are missing, and a manifest with `kind` and, of duplicates, the clip that they copy."""
    dataset, scenes = moving_clips("train", clips)
    kinds, numbers = kinds_of(clips), np.random.default_rng(1)
    clean = [i for i, kind in enumerate(kinds) if kind == "clean"]
    copied = dict(
        zip((i for i, kind in enumerate(kinds) if kind == "duplicate"), numbers.permutation(clean), strict=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, kind in enumerate(kinds):
        copy = int(copied.get(i, i))
        source = scenes[copy]
        path = folder / f"{i:05d}.mp4"
        if not path.exists():
            video = spoil(dataset.load(source).video, kind)
            write_mp4(path, video, FPS, crf=26 if kind == "duplicate" else 17)
        other = source
        while kind == "wrong caption" and dataset.scene(other).triple == dataset.scene(source).triple:
            other = scenes[int(numbers.integers(clips))]
        caption = dataset.caption(other)
        rows.append({"path": path.name, "caption": caption, "kind": kind, "copy_of": f"{copy:05d}.mp4"})
    manifest = folder / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    return manifest


def moving_clips(split: Split, clips: int) -> tuple[ShapesDataset, list[int]]:
    """Return the data set, and the first of its clips that are not still: those would be static by their captions."""
    dataset = ShapesDataset(frames=FRAMES, height=SIDE, width=SIDE, fps=FPS, split=split, length=2 * clips, spread=0.5)
    moving = [i for i in range(2 * clips) if dataset.scene(i).triple.motion != "still"]
    return dataset, moving[:clips]


def spoil(video: torch.Tensor, kind: str) -> torch.Tensor:
    """Spoil a clip [3, T, H, W]; duplicates are another encoding, a little brighter."""
    if kind == "static":
        return video[:, :1].expand_as(video)
    if kind == "blurred":
        sigma = BLUR * video.shape[-1]
        return gaussian_blur(video.transpose(0, 1), 2 * round(3 * sigma) + 1, sigma).transpose(0, 1)
    if kind == "letterboxed":
        bar, video = round(BAR * video.shape[-2]), video.clone()
        video[..., :bar, :] = video[..., -bar:, :] = -1.0
    return video + 0.03 if kind == "duplicate" else video


def caption_truly(kept: Path, clips: int, out: Path) -> None:
    """Write a manifest of the clips that were kept, with the captions that a perfect captioner would write."""
    dataset, scenes = moving_clips("train", clips)
    table = pq.read_table(kept)
    truth = [dataset.caption(scenes[int(Path(source).stem)]) for source in table["copy_of"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(truth)), out)


def curate(manifest: Path) -> dict[str, Path]:
    """Run score, the filter `basic` and dedup; returns the manifest of each."""
    outs = {name: manifest.with_name(f"{name}.parquet") for name in ("score", "filter", "dedup")}
    run(ScoreStep(), open_rows(str(manifest)), str(outs["score"]), Inline())
    scored = open_rows(str(outs["score"]))
    keep = load_preset("basic").condition(scored.schema.names)
    run(open_filter(keep, scored), scored, str(outs["filter"]), Inline())
    dedup(open_rows(str(outs["filter"])), str(outs["dedup"]), Inline(), step=HashStep())
    return outs


def reasons(outs: dict[str, Path]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return why each rejected clip was: the filter's column or "dedup", and the reject; by file name."""
    found = {}
    for step in ("filter", "dedup"):
        for line in Path(rejects_path(str(outs[step]))).read_text().splitlines():
            reject = json.loads(line)
            found[Path(reject["path"]).name] = (reject.get("column", step), reject)
    return found


def find_copies(truth: Mapping[str, Any], rejected: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return which rejects of dedup are one of a clip and its copy, and the copies that it found."""
    right, found = set(), set()
    for copy, row in truth.items():
        both = {copy, row["copy_of"]}
        dropped = {
            path for path in both & rejected.keys() if any(one in rejected[path]["reason"] for one in both - {path})
        }
        right |= dropped
        found |= {copy} if dropped else set()
    return right, found


def compare_settings(manifest: Path, filtered: Path) -> list[str]:
    """Return a table of dedup with several settings."""
    truth = {row["path"]: row for row in pq.read_table(manifest).to_pylist()}
    copies = sum(row["kind"] == "duplicate" for row in truth.values())
    lines = [
        "| `--fps` | `--share` | rejected | of these right | precision | recall |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for fps, share in ((1.0, 0.5), (1.0, 0.8), (4.0, 0.5), (4.0, 0.8)):
        out = manifest.with_name(f"dedup-{fps:g}-{share:g}.parquet")
        dedup(open_rows(str(filtered)), str(out), Inline(), step=HashStep(fps), matching=Matching(share=share))
        listed = map(json.loads, Path(rejects_path(str(out))).read_text().splitlines())
        rejected = {Path(reject["path"]).name: reject for reject in listed}
        right, found = find_copies(truth, rejected)
        lines.append(
            f"| {fps:g} | {share:g} | {len(rejected)} | {len(right)} | {len(right) / max(len(rejected), 1):.2f} | "
            f"{len(found) / copies:.2f} |"
        )
    return lines


def tables(manifest: Path, outs: dict[str, Path]) -> list[str]:
    """Return the outcome by kind, and the precision and recall of what looks for each kind."""
    truth = {row["path"]: row for row in pq.read_table(manifest).to_pylist()}
    rejected = reasons(outs)
    counts = Counter((row["kind"], rejected[path][0] if path in rejected else "kept") for path, row in truth.items())
    columns = [*sorted({reason for _, reason in counts} - {"kept", "dedup"}), "dedup", "kept"]
    lines = [f"| kind | clips | {' | '.join(columns)} |", "|---|---:" + "|---:" * len(columns) + "|"]
    for kind in ("clean", *SHARES):
        total = sum(count for (one, _), count in counts.items() if one == kind)
        lines.append(f"| {kind} | {total} | {' | '.join(str(counts[kind, column] or '') for column in columns)} |")
    lines += [
        "",
        "| to find | by | rejected by it | of these right | precision | recall |",
        "|---|---|---:|---:|---:|---:|",
    ]
    spoiled = {path for path, row in truth.items() if row["kind"] != "clean"}
    good = handled = spoiled & rejected.keys()
    for kind, by in FOUND_BY.items():
        hits = {path for path, (reason, _) in rejected.items() if reason in by}
        wanted = [path for path, row in truth.items() if row["kind"] == kind]
        if kind == "duplicate":  # either of the two may be dropped, as the same as the other
            right, done = find_copies(truth, {path: rejected[path][1] for path in hits})
        else:
            right = done = hits & set(wanted)
        recall = len(done) / len(wanted)
        good, handled = good | right, handled | done
        precision = f"{len(right) / len(hits):.2f}" if hits else "-"
        lines.append(
            f"| {kind} | {', '.join(by) or 'no step'} | {len(hits)} | {len(right)} | {precision} | {recall:.2f} |"
        )
    share = f"{len(good) / len(rejected):.2f}" if rejected else "-"
    recall = len(handled) / len(spoiled)
    lines.append(f"| any of them | all steps | {len(rejected)} | {len(good)} | {share} | {recall:.2f} |")
    return lines


class Training(findings.Findings):
    """The runs on each set of clips in `ABOUT`.

    Args:
        folder: holds clips, latents, runs and results.
        manifests: the manifest of each arm.
        minutes, prompts: as for `Findings`; an arm trains for as many steps as its arm `base`.
    """

    def __init__(self, folder: Path, manifests: dict[str, Path], minutes: float, prompts: int) -> None:
        super().__init__(folder, minutes, prompts)
        self.manifests = manifests
        (base,) = self.arms["base"].stages
        self.arms = {}
        for name, manifest in manifests.items():
            rows = pq.read_metadata(manifest).num_rows
            data = replace(base.data, source=name, validation_source="held", clips=rows, interval=1, flip=False)
            self.arms[name] = Arm(name, f"{ABOUT[name]}: {rows} clips", (replace(base, data=data),))

    def _cached(self, config: TrainConfig) -> TrainConfig:
        """Return settings that read the arm's clips from a cache, and validate on the clean ones that are held out."""
        data = replace(
            config.data,
            source=str(self._cache(config, config.data.source)),
            validation_source=str(self._cache(config, "held")),
            cache_latents=False,
        )
        return replace(config, data=data)

    def _cache(self, config: TrainConfig, name: str) -> Path:
        cache = self.folder / "latents" / name
        if not all((cache / part / INDEX).is_file() for part in ("video", "text")):
            print(f"encoding {name} to {cache}", flush=True)
            manifest = self.manifests.get(name, self.folder / "held" / "clips.parquet")
            data = replace(config.data, source=str(manifest), validation_source=None)
            names = {"vae": data.vae, "text_encoder": data.text_encoder}
            for job in open_jobs(replace(config, seed=0, data=data), names, Encoding(str(cache)), World()):
                job.run()
        return cache


QUESTION = Question(
    "curation",
    "Training on what was kept",
    "Equal steps, models and seeds (8 frames of 48x48, as `base` in README.md); the sets of clips differ. The "
    "validation loss is that of 64 clean clips. `captioned` shows what a step that looks at captions could add: its "
    "clips are those of `kept`, and their captions are true, as a perfect captioner would write them.",
    (
        Contrast("kept", "all", "better", "Training on what was kept against training on all clips"),
        Contrast("captioned", "all", "better", "Training on what was kept, with true captions, against all clips"),
        Contrast("clean", "all", "better", "Training on clips that are not spoiled against training on all clips"),
    ),
)
INTRODUCTION = """# Curation of a spoiled set

{count} clips of `shapes` that move ({frames} frames of {side}x{side} at {fps:g} frames/s, H.264) are spoiled on
purpose: {shares}.
Then `score`, `filter --preset basic` and `dedup` run over them with their defaults. A static clip is its first frame; a
duplicate is another encoding of a clean clip, slightly brighter, and one of the two should go; bars cover {bars:.0f} %
of a letterboxed picture.

    uv run python benchmarks/findings/spoiled.py {folder}
    uv run python benchmarks/findings/spoiled.py {folder} --train

Rows are what is wrong with the clips, columns the score or step by which they were rejected:
"""
LIMITS = """
No step looks at captions, so wrong ones stay. `score --clip MODEL` compares captions with pictures; it was not run,
since it takes a CLIP model's weights, and a model of photographs is not made for these drawings. The shapes are also
plainer than footage: the numbers of real sets differ.

`dedup` is wrong about clips of one shape that start at the same place: of two seconds it compares two frames (one per
second), of which one is enough (half of them), and its hashes do not see colour. More frames or a larger share tell
such clips apart:
"""

READING = """
Scoring, filtering and removing duplicates alone did not help here. They find what is wrong with pictures, so the share
of wrong captions rises from {before:.0f} % of all clips to {after:.0f} % of those that are kept. With true captions
the same clips are better than all clips, by about as much as the clips that are not spoiled: captions are worth a
step of their own (`stdit data caption --overwrite`, or `score --clip`). After 700 steps no model gets colour, shape
and motion of a prompt right together, so the losses say more than these shares.
"""


def page(folder: Path, manifest: Path, outs: dict[str, Path]) -> str:
    """Return curation.md."""
    clips = pq.read_metadata(manifest).num_rows
    shares = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in SHARES.items())
    about = INTRODUCTION.format(
        count=clips, frames=FRAMES, side=SIDE, fps=FPS, shares=shares, bars=200 * BAR, folder=folder
    )
    parts = [about, *tables(manifest, outs), LIMITS, *compare_settings(manifest, outs["filter"]), ""]
    results = read_results(folder)
    if not results:
        parts.append(f"## {QUESTION.title}\n\nNot measured yet (`--train`).")
    else:
        wrong = [wrong_captions(rows) for rows in (manifest, outs["dedup"])]
        parts += [section(QUESTION, results).rstrip(), READING.format(before=wrong[0], after=wrong[1])]
    return "\n".join(parts).rstrip() + "\n"


def wrong_captions(manifest: Path) -> float:
    """Return the percentage of clips that have another clip's caption."""
    kinds = pq.read_table(manifest, columns=["kind"])["kind"].to_pylist()
    return 100 * kinds.count("wrong caption") / len(kinds)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="spoiled.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="as of run.py: the steps follow from it")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    if given.clips < 20 or given.seeds < 1 or given.prompts < 1 or not given.minutes > 0:
        parser.error("expected at least 20 --clips, and --seeds, --prompts and --minutes above 0")
    folder = given.run_dir.resolve()
    try:
        manifest = write_clips(folder / f"clips-{given.clips}", given.clips)
        outs = curate(manifest)
        replace_text(given.out, page(given.run_dir, manifest, outs))
        if given.train:
            write_held(folder / "held")
            clean, captioned = manifest.with_name("clean.parquet"), manifest.with_name("captioned.parquet")
            caption_truly(outs["dedup"], given.clips, captioned)
            table = pq.read_table(manifest)
            pq.write_table(table.filter(pc.equal(table["kind"], "clean")), clean)
            manifests = {"all": manifest, "kept": outs["dedup"], "captioned": captioned, "clean": clean}
            Training(folder, manifests, given.minutes, given.prompts).run([QUESTION], given.seeds)
            replace_text(given.out, page(given.run_dir, manifest, outs))
    except (findings.Interrupted, KeyboardInterrupt):
        print("stopped and saved; run the same command again to resume", file=sys.stderr)
        return findings.INTERRUPTED
    except (ConfigError, DataError, RunEnded) as error:
        print(f"spoiled: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


def write_held(folder: Path) -> None:
    """Write the clean clips of the validation loss, and their manifest."""
    dataset, scenes = moving_clips("val", HELD)
    folder.mkdir(parents=True, exist_ok=True)
    for i in scenes:
        if not (path := folder / f"{i:05d}.mp4").exists():
            write_mp4(path, dataset.load(i).video, FPS)
    rows = [{"path": f"{i:05d}.mp4", "caption": dataset.caption(i)} for i in scenes]
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
