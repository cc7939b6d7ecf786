"""The same data, noise, timesteps and start for every arm: what differs is what is compared, and nothing else.

Each arm with each seed is a run folder of its own, so that an interrupted ablation goes on where it was.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stdit_data.clip import ClipDataset
from stdit_data.files import replace_text
from stdit_data.latents.dataset import LatentDataset
from stdit_model import STDiT, video_vae
from stdit_train.ablation.arms import Arm, Match, estimate_arm, reference_arm
from stdit_train.ablation.matching import Cost, measure_cost, same_start, with_length, with_parameters_matched
from stdit_train.ablation.results import SCORES, Result, read_result
from stdit_train.callbacks import Callback, NullCallback
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components, check_components, load_components
from stdit_train.config.load import ConfigError, flat, from_dict, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets, cached_in_memory
from stdit_train.distributed.parallelize import build_model
from stdit_train.errors import Diverged
from stdit_train.hardware import find_device
from stdit_train.trainer import Trainer

DIVERGED = "diverged_at_step"  # in a run's notes
FILE = "ablation.json"  # what was asked for, and the settings that followed from it


@dataclass(frozen=True)
class Study:
    """What to compare."""

    base: TrainConfig
    arms: Sequence[Arm]
    seeds: int
    match: Match
    steps: int | None  # of the reference arm; else as many as fit into `minutes`
    minutes: float | None
    prompts: int  # of each split, that every finished run is scored by; 0 for none
    given: dict[str, Any]  # settings that the user named


class Ablation:
    """Trains and scores every arm of a study with every seed, whichever are not done yet.

    Args:
        study: what to compare.
        folder: of all the runs.
        said: told what is going on.
    """

    def __init__(self, study: Study, folder: Path, said: Callable[[str], None]) -> None:
        self.study, self.folder, self.said = study, folder, said
        self.device = find_device()
        self._components: dict[tuple[str, ...], Components] = {}
        self._shared: tuple[Any, ClipDataset] | None = None  # the clips of one seed, encoded once for all arms
        self.arms = self._settled()

    # -- what is run -----------------------------------------------------------------------------------------------

    def _settled(self) -> list[Arm]:
        """The arms with everything that follows from matching and budget, as saved if there is something saved.

        Raises:
            ConfigError: the folder holds another ablation.
        """
        study, file = self.study, self.folder / FILE
        request = {"match": study.match, "steps": study.steps, "minutes": study.minutes, "prompts": study.prompts}
        saved: dict[str, Any] = {"request": request, "arms": {}, "costs": {}}
        if file.is_file():
            saved = json.loads(file.read_text())
            for key, value in request.items():
                if saved["request"][key] != value:
                    raise ConfigError(
                        f"{self.folder} holds an ablation with other settings ({key}: {saved['request'][key]}, now "
                        f"{value}): choose another folder with --out"
                    )
        known = {name: Arm(name, settings) for name, settings in saved["arms"].items()}
        new = [arm for arm in study.arms if arm.name not in known]
        if known and new and study.steps is None:
            raise ConfigError(
                f"{self.folder} was planned for {', '.join(known)}, without {new[0].name}: choose another folder with "
                "--out, or give --steps from the start"
            )
        if new:
            planned, costs = self._planned(list(study.arms))
            known |= {arm.name: arm for arm in planned if arm.name not in known}
            saved["arms"] = {name: arm.settings for name, arm in known.items()}
            saved["costs"] = {**{name: asdict(cost) for name, cost in costs.items()}, **saved["costs"]}
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(saved, indent=1) + "\n")
        return [known[arm.name] for arm in study.arms]

    def _planned(self, arms: list[Arm]) -> tuple[list[Arm], dict[str, Cost]]:
        study, costs, started = self.study, dict[str, Cost](), time.perf_counter()
        if study.match == "parameters":
            target = estimate_arm(reference_arm(study.base, arms).config(study.base)).parameters
            arms = [with_parameters_matched(arm, study.base, target) for arm in arms]
        if study.steps is None or study.match == "time":
            for arm in arms:
                self.said(f"timing a few steps of {arm.name}")
                costs[arm.name] = measure_cost(arm.config(study.base, 0), self._scratch)
        splits = 2 if study.prompts else 0
        minutes = study.minutes and study.minutes - (time.perf_counter() - started) / 60  # what timing has left
        length = study.steps, minutes, study.seeds, splits * study.prompts
        return with_length(study.base, arms, study.match, study.given, *length, costs), costs

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Of a run."""
        return arm.config(self.study.base, seed)

    def run_folder(self, arm: Arm, seed: int) -> RunFolder:
        """Of a run."""
        return RunFolder(self.folder / f"{arm.name}-seed{seed}")

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[Arm, int], Callback]) -> bool:
        """Train and score what isn't yet; whether all came to its end (an interruption stops it early).

        Args:
            watch: gives the watcher of a run that is about to be trained.

        Raises:
            ConfigError: the folder holds runs with other settings.
        """
        for seed in range(self.study.seeds):
            for arm in self.arms:
                run, config = self.run_folder(arm, seed), self.config(arm, seed)
                if not is_finished(run, config) and not self._train(arm, seed, watch(arm, seed)):
                    return False
                if DIVERGED in run.notes():
                    continue
                if self.scored and not (run.path / SCORES).exists():
                    self._score(run)
        return True

    def results(self) -> list[Result]:
        """Of all runs that came to their end, seed by seed."""
        found = []
        for seed in range(self.study.seeds):
            for arm in self.arms:
                run, config = self.run_folder(arm, seed), self.config(arm, seed)
                if is_finished(run, config) and DIVERGED not in run.notes():
                    found.append(read_result(run, config, arm.name))
        return found

    def diverged(self) -> dict[str, list[int]]:
        """The seeds of each arm whose runs ended with a loss that is not finite."""
        ended = {
            arm.name: [seed for seed in range(self.study.seeds) if DIVERGED in self.run_folder(arm, seed).notes()]
            for arm in self.arms
        }
        return {name: seeds for name, seeds in ended.items() if seeds}

    @property
    def scored(self) -> bool:
        """Whether runs are scored by what their videos show: of `shapes` alone it is known."""
        return self.study.prompts > 0 and self.study.base.data.source == "shapes"

    def _train(self, arm: Arm, seed: int, watcher: Callback) -> bool:
        """One run, from its last checkpoint where it has one; whether it came to its end, or diverged for good."""
        config, run = self.config(arm, seed), self.run_folder(arm, seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if not run.config_file.exists():
            run.create(config)
        trainer = self._trainer(seed, config, run, watcher)
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None:
            trainer.resume(checkpoint)
        try:
            return trainer.train().finished
        except Diverged:  # an outcome like any other: the other arms go on
            run.note(**{DIVERGED: trainer.step})
            self.said(f"{run.path.name}: diverged, {config.max_skipped} steps before {trainer.step} were not finite")
            return True

    def _trainer(self, seed: int, config: TrainConfig, run: RunFolder, watcher: Callback) -> Trainer:
        components = self._parts(config)
        reference = reference_arm(self.study.base, self.arms)  # first: its runs don't depend on which others take part
        arms = [reference, *(arm for arm in self.arms if arm is not reference)]
        model, share = same_start(
            lambda c: self._model(c, self._parts(c)), [self.config(arm, seed) for arm in arms], config
        )
        if config.init is not None:
            watcher.said(load_initial(model, config.init))
        run.note(same_start=round(share, 4))
        dataset, validation, prompts = self._datasets(config, components)
        return Trainer(
            config, run, model.to(self.device), components, dataset, validation, prompts, self.device, watcher
        )

    def _scratch(self, config: TrainConfig, run: RunFolder) -> Trainer:
        """A trainer to time, which leaves nothing behind."""
        components = self._parts(config)
        dataset, validation, prompts = self._datasets(config, components)
        model = self._model(config, components).to(self.device)
        return Trainer(config, run, model, components, dataset, validation, prompts, self.device, NullCallback())

    @staticmethod
    def _model(config: TrainConfig, components: Components) -> STDiT:
        return build_model(config, components.vae.config.latent_channels, components.text_encoder.config.d_model)

    def _parts(self, config: TrainConfig) -> Components:
        key = (config.data.vae, config.data.text_encoder, config.precision)
        if key not in self._components:
            self._components[key] = load_components(
                config.data.vae, config.data.text_encoder, self.device, config.precision
            )
        return self._components[key]

    def _datasets(
        self, config: TrainConfig, components: Components
    ) -> tuple[ClipDataset, ClipDataset | None, list[str]]:
        """As for any run, but clips whose latents are kept in memory are encoded once for all arms that share them."""
        dataset, validation, prompts = build_datasets(config)
        if isinstance(dataset, LatentDataset):
            check_components(dataset, components)
        elif config.data.remember_latents:
            key = (config.seed, config.data)
            if self._shared is None or self._shared[0] != key:
                size = (config.data.frames, config.data.height, config.data.width)
                shape = video_vae.latent_shape(components.vae, *size)[1:]
                self._shared = key, cached_in_memory(dataset, components.vae, self.device, shape)
            dataset = self._shared[1]
        return dataset, validation, prompts

    def _score(self, run: RunFolder) -> None:
        """Prompt-following of a finished run, with the same prompts and noise for all."""
        from stdit_train.evaluation.evaluate import evaluate_pipeline, write_scores
        from stdit_train.pipeline.load import load_pipeline

        self.said(f"{run.path.name}: sampling {self.study.prompts} seen and {self.study.prompts} held-out prompts")
        pipeline = load_pipeline(str(run.path))
        splits: dict[str, Any] = {"seen": "train", "held-out": "heldout"}
        scores = {name: evaluate_pipeline(pipeline, split, self.study.prompts) for name, split in splits.items()}
        settings = {"checkpoint": str(run.path), "prompts": self.study.prompts, "seed": 0}
        write_scores(scores, settings, run.path / SCORES)


def is_finished(run: RunFolder, config: TrainConfig) -> bool:
    """Whether a run folder holds this run, done, or diverged.

    Raises:
        ConfigError: it holds a run with other settings.
    """
    if not run.config_file.exists():
        return False
    saved = from_dict(run.read_config())
    if saved != config:
        theirs, ours = flat(to_dict(saved)), flat(to_dict(config))
        key = next(key for key in ours if ours[key] != theirs[key])
        raise ConfigError(
            f"{run.path} holds a run with other settings ({key}: {theirs[key]}, now {ours[key]}): "
            "choose another folder with --out"
        )
    return DIVERGED in run.notes() or (run.finished and (run.pipeline / "model_index.json").exists())
