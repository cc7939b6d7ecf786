"""Define the questions that run.py answers: the arms of each, matched in compute, and the contrasts between them.

Steps are derived from FLOPs (matrix products of the transformer), so that "equal compute" is a number. An arm is one
stage, or several that pass on their weights, as `stdit train` and `stdit train --curriculum` run them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from stdit_train.ablation.arms import estimate_arm
from stdit_train.config.load import load_curriculum, load_stage
from stdit_train.config.schema import TrainConfig

MINUTES = 75.0  # for all runs with three seeds, on one thread of the machine that README.md names
SEEDS = 3
PROMPTS = 40  # seen prompts for evaluating a finished run, and half as many held-out ones
STEPS = 700  # of the arm `base` within MINUTES; the steps of all others follow from it
SIDE = 48  # pixels; the smallest size at which the demo's VAE keeps shapes legible
WIDTH = 64  # of the model; the demo's is 96, but a narrower model learns more in a minute or two
DEMO_STEPS = 3000  # of the stage `demo`, with either objective
PROGRESSIVE = 0.5  # share of the curriculum's own steps
CLIPS = 2048  # most clips of `shapes` to encode; the same for all seeds
NOISE = 1 / 3  # share of captions replaced with another clip's in the arm `noisy`

PARTS = {"data.vae": "demo", "data.text_encoder": "demo", "data.workers": 0}

Verdict = Literal["better", "worse"]


@dataclass(frozen=True)
class Arm:
    """One configuration to compare; with a seed, a run of one or more stages."""

    name: str  # also the name of its folder
    about: str
    stages: tuple[TrainConfig, ...]
    image: str | None = None  # the arm whose model initialises this one, as a PixArt file
    scored: bool = True  # evaluated by prompts; single images have no motion to read

    @property
    def flops(self) -> int:
        """FLOPs of all steps of all stages, without those of `image`."""
        return sum(stage.steps * estimate_arm(stage).step_flops for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens processed in all steps."""
        return sum(stage.steps * stage.global_batch * estimate_arm(stage).tokens for stage in self.stages)

    def seeded(self, seed: int) -> list[TrainConfig]:
        """Return the configurations of the arm's run with a seed."""
        return [replace(stage, seed=seed) for stage in self.stages]


@dataclass(frozen=True)
class Contrast:
    """The first arm minus the second, seed by seed, and what the report's finding predicts for the first."""

    arm: str
    against: str
    expected: Verdict
    says: str  # the comparison, as the subject of a sentence


@dataclass(frozen=True)
class Question:
    """A finding of the report, and how it is tested."""

    name: str
    title: str
    about: str
    contrasts: tuple[Contrast, ...]
    by_loss: bool = True  # whether the validation losses of its arms can be compared
    extra: bool = False  # run only with --only NAME, since it takes long

    @property
    def arms(self) -> list[str]:
        """Names of all arms that take part."""
        return list(dict.fromkeys(name for c in self.contrasts for name in (c.against, c.arm)))


def _spread(config: TrainConfig) -> TrainConfig:
    """Space validation, checkpoints and samples evenly over a run of any length."""
    often = {"validate_every": config.steps // 2, "checkpoint_every": config.steps // 10}
    return replace(config, **{key: max(every, 1) for key, every in often.items()}, sample_every=config.steps)


def _progressive(scale: float) -> tuple[TrainConfig, ...]:
    """Return `shapes-progressive` with the smaller model and all stages shortened by the same factor."""
    found = []
    for config in load_curriculum("shapes-progressive", {"model.hidden_size": WIDTH, **PARTS}):
        steps = max(round(config.steps * scale), 2)
        clips = min(config.data.clips, steps * config.global_batch)
        found.append(_spread(replace(config, steps=steps, data=replace(config.data, clips=clips))))
    return tuple(found)


def make_arms(minutes: float) -> dict[str, Arm]:
    """Return every arm by name, each after the one that initialises it, sized so that all take about `minutes`."""
    steps = max(round(STEPS * minutes / MINUTES), 2)
    common = {
        "data.frames": 8,
        "data.height": SIDE,
        "data.width": SIDE,
        "data.clips": min(CLIPS, 8 * steps),
        "model.hidden_size": WIDTH,
        "model.time_scale": 0.5,
        "model.space_scale": SIDE / 64,
        **PARTS,
    }

    def run(steps: int, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[TrainConfig]:
        return (_spread(load_stage("demo", {**common, "steps": steps, **settings})),)

    def matched(flops: float, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[TrainConfig]:
        return run(max(round(flops / estimate_arm(run(1, settings)[0]).step_flops), 2), settings)

    def demo(settings: Mapping[str, Any], times: int = 1) -> tuple[TrainConfig]:
        steps = times * max(round(DEMO_STEPS * minutes / MINUTES), 2)
        return (
            _spread(load_stage("demo", {"data.clips": min(CLIPS, 8 * steps), "steps": steps, **PARTS, **settings})),
        )

    base = Arm("base", "seq, patch (1,2,2), rectified flow, clean captions, fp32", run(steps))
    optimizer = base.stages[0].optimizer
    fast = {"optimizer.lr": 5 * optimizer.lr, "optimizer.muon_lr": 5 * optimizer.muon_lr}
    faster = {"optimizer.lr": 25 * optimizer.lr, "optimizer.muon_lr": 25 * optimizer.muon_lr}
    single = {"model.variant": "dit", "data.frames": 1, "global_batch": 32}
    latte, iddpm = {"model.variant": "latte"}, {"objective.name": "iddpm", "sampling.steps": 50}
    halves = {name: {"precision": name, "log_every": 1} for name in ("bf16", "fp16")}
    progressive = Arm("progressive", "`shapes-progressive`: 8x32, its correctly captioned subset, 8x64, 16x64",
                      _progressive(PROGRESSIVE * steps / STEPS))  # fmt: skip
    last = progressive.stages[-1]
    alone = max(round(progressive.flops / estimate_arm(last).step_flops), 2)
    listed = [
        base,
        progressive,
        Arm("last-stage", "the last stage alone, from scratch", (_spread(replace(last, steps=alone)),)),
        Arm("image", "dit on single frames", matched(base.flops / 2, single), scored=False),
        Arm("seq-image", "seq from `image`, half of base's FLOPs", matched(base.flops / 2), "image"),
        Arm("seq-half", "seq from scratch, half of base's FLOPs", matched(base.flops / 2)),
        Arm("latte-image", "latte from `image`, half of base's FLOPs", matched(base.flops / 2, latte), "image"),
        Arm("latte", "latte from scratch, all of base's FLOPs", matched(base.flops, latte)),
        Arm("patch-222", "patch (2,2,2)", matched(base.flops, {"model.patch_size": [2, 2, 2]})),
        Arm("rate-x5", "both learning rates 5 times as high", run(steps, fast)),
        Arm("rate-x25", "both learning rates 25 times as high", run(steps, faster)),
        Arm("noisy", "a third of the captions are another clip's", run(steps, {"data.caption_noise": NOISE})),
        Arm("bf16", "bfloat16 autocast, half of base's steps", run(max(steps // 2, 2), halves["bf16"])),
        Arm("fp16", "float16 autocast, loss scaling, half of base's steps", run(max(steps // 2, 2), halves["fp16"])),
        Arm("iddpm", "iDDPM with learned variance, base's steps", run(steps, iddpm)),
        Arm("iddpm-long", "iDDPM with learned variance, three times base's steps", run(3 * steps, iddpm)),
        Arm("demo-flow", "the stage `demo`, rectified flow", demo({})),
        Arm("demo-iddpm", "the stage `demo`, iDDPM", demo(iddpm)),
        Arm("demo-iddpm-long", "the stage `demo`, iDDPM, three times the steps", demo(iddpm, 3)),
    ]  # fmt: skip
    return {arm.name: arm for arm in listed}


QUESTIONS = (
    Question(
        "progressive",
        "A progressive curriculum against its last stage alone",
        "The report trains on short and small clips first, then on better, larger, and longer ones. `progressive` is "
        "`stdit train --curriculum shapes-progressive`, shortened; `last-stage` spends the same FLOPs, all of them at "
        "the last stage's size. Equal FLOPs do not mean equal time: small steps use a CPU less efficiently.",
        (Contrast("progressive", "last-stage", "better", "The progressive curriculum against its last stage alone"),),
    ),
    Question(
        "image",
        "Starting from an image model, with temporal attention at zero, against starting from scratch",
        "`image` is trained on single frames (dit, one frame; its captions still name motions, which no frame shows), "
        "saved in the layout of PixArt's release, and loaded with `--init`, as PixArt's weights are. In the comparison "
        "with `base`, FLOPs are equal including those of `image`; in that with `seq-half`, those of `image` are free, "
        "as with downloaded weights. Latte is the contrast: half of its blocks have no counterpart in an image model.",
        (
            Contrast("seq-image", "base", "better", "seq from image weights against from scratch, equal total FLOPs"),
            Contrast("seq-image", "seq-half", "better", "seq from image weights against from scratch, equal steps"),
            Contrast("latte-image", "latte", "better", "latte from image weights against from scratch, equal FLOPs"),
            Contrast("seq-image", "latte-image", "better", "seq against latte, both from image weights"),
        ),
    ),
    Question(
        "patches",
        "3-D patches",
        "Patches of two frames halve the number of tokens; equal FLOPs then allow about twice the steps.",
        (Contrast("patch-222", "base", "worse", "Patches (2,2,2) against (1,2,2)"),),
    ),
    Question(
        "rate",
        "A learning rate that is too high",
        "According to the report, 1e-4 is too high where 2e-5 works, a factor of 5. Here the demo's two learning rates "
        "(Muon's and AdamW's) are multiplied by 5, and by 25.",
        (
            Contrast("rate-x5", "base", "worse", "Five times the learning rate"),
            Contrast("rate-x25", "base", "worse", "Twenty-five times the learning rate"),
        ),
    ),
    Question(
        "precision",
        "fp16 against bf16",
        "The report found fp16 unstable, with a large batch and 700 million parameters. Steps whose gradients overflow "
        "are skipped and counted. On a CPU, both are autocast of the matrix products.",
        (Contrast("fp16", "bf16", "worse", "fp16 against bf16"),),
    ),
    Question(
        "captions",
        "Noisy captions",
        "Both arms train on the same clips; in `noisy`, a third of them have another clip's caption. Validation clips "
        "keep their own.",
        (Contrast("noisy", "base", "worse", "Noisy captions against clean ones"),),
    ),
    Question(
        "objective",
        "iDDPM, the published objective, against rectified flow",
        "The published objective (learned variance, 50 ancestral steps) against rectified flow (20 Euler steps), with "
        "the same guidance. Their losses measure different things, so only the videos are compared. The report does "
        "not cover this; the expectation comes from later work.",
        (
            Contrast("iddpm", "base", "worse", "iDDPM against rectified flow at equal steps"),
            Contrast("iddpm-long", "base", "worse", "iDDPM with three times the steps against rectified flow"),
            Contrast("iddpm-long", "iddpm", "better", "iDDPM with three times the steps against its own shorter run"),
        ),
        by_loss=False,
    ),
    Question(
        "demo",
        "The published objective on the demo model",
        "The stage `demo` (16 frames of 64x64, width 96) on cached latents, trained longer, with either objective.",
        (
            Contrast("demo-iddpm", "demo-flow", "worse", "iDDPM against rectified flow on the demo model"),
            Contrast("demo-iddpm-long", "demo-flow", "worse", "iDDPM, three times the steps, against rectified flow"),
            Contrast("demo-iddpm-long", "demo-iddpm", "better", "iDDPM, three times the steps, against fewer steps"),
        ),
        by_loss=False,
        extra=True,
    ),
)  # fmt: skip


def needed_arms(questions: list[Question], arms: Mapping[str, Arm]) -> list[Arm]:
    """Return the arms that these questions need, each once and after the one that initialises it."""
    names = {name for question in questions for name in question.arms}
    names |= {start for name in names if (start := arms[name].image) is not None}
    return [arm for arm in arms.values() if arm.name in names]
