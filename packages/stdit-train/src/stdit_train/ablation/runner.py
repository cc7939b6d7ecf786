"""Train and score every arm of a study with every seed.

Within a seed, all arms have the same clips, noise, timesteps and initial weights, so that they differ in what is
compared alone. Each arm with each seed is a run folder, so that an interrupted ablation can be resumed.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from stdit_data.clip import ClipDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_data.storage.atomic import replace_text
from stdit_model import STDiT
from stdit_model.video_vae import latent_channels
from stdit_train.ablation.arms import Arm, Study, estimate_arm, reference_arm
from stdit_train.ablation.costs import Cost, measure_costs, measured, study_seconds
from stdit_train.ablation.matching import share_initial_weights, with_length, with_parameters_matched
from stdit_train.ablation.results import SCORES, Result, read_result
from stdit_train.callbacks import Callback, NullCallback
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components, check_components, load_components
from stdit_train.config.load import flatten, from_dict, read_settings, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets, cached_in_memory
from stdit_train.distributed.parallelize import build_model
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError, Diverged
from stdit_train.evaluation.evaluate import evaluate_pipeline, write_scores
from stdit_train.hardware import find_device
from stdit_train.pipeline.load import load_pipeline
from stdit_train.task import STDiTTask
from stdit_train.trainer import Trainer

log = logging.getLogger(__name__)

DIVERGED = "diverged_at_step"  # in a run's metadata
STUDY_FILE = "ablation.json"  # what was asked for, and the arms' settings that follow from it


class Ablation:
    """The runs of a study.

    Args:
        study: what to compare.
        folder: holds all runs; created if it does not exist.

    Raises:
        ConfigError: the folder holds another study.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.device = find_device()
        self._components: dict[tuple[str, ...], Components] = {}
        self._shared: tuple[Any, ClipDataset] | None = None  # the clips of one seed, encoded once for all arms
        started = time.perf_counter()
        self.arms = self._plan()
        self._planning = time.perf_counter() - started
        self.remaining()  # checks the runs that are there

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Return the settings of a run."""
        return arm.config(self.study.base, seed)

    def run_folder(self, arm: Arm, seed: int) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.folder / f"{arm.name}-seed{seed}")

    def run(self, watch: Callable[[Arm, int], Callback]) -> bool:
        """Train and score the runs that are missing; returns False if interrupted.

        Args:
            watch: returns the callback of a run that is about to be trained.

        Raises:
            ConfigError: the folder holds runs with other settings.
        """
        started = time.perf_counter()
        try:
            return all(self._run(arm, seed, watch) for seed in range(self.study.seeds) for arm in self.arms)
        finally:
            saved = read_settings(self.folder / STUDY_FILE)
            taken = self._planning + time.perf_counter() - started
            self._save(saved | {"seconds": saved.get("seconds", 0.0) + taken})

    def results(self) -> list[Result]:
        """Read the results of all finished runs, seed by seed; those that diverged have none."""
        found = []
        for seed in range(self.study.seeds):
            for arm in self.arms:
                run, config = self.run_folder(arm, seed), self.config(arm, seed)
                if is_finished(run, config) and DIVERGED not in run.metadata():
                    cost = self.costs.get(arm.name)
                    found.append(read_result(run, config, arm.name, None if cost is None else cost.step))
        return found

    def diverged(self) -> dict[str, list[int]]:
        """Return the seeds of each arm whose runs ended with a loss that is not finite."""
        ended = {
            arm.name: [seed for seed in range(self.study.seeds) if DIVERGED in self.run_folder(arm, seed).metadata()]
            for arm in self.arms
        }
        return {name: seeds for name, seeds in ended.items() if seeds}

    def seconds_of(self, steps: Mapping[str, int], seeds: int) -> float | None:
        """Estimate the seconds of so many steps of each arm, by name; None where the arms have not been measured."""
        if any(name not in self.costs for name in steps):
            return None  # planned by an older version
        return study_seconds(replace(self.study, seeds=seeds), steps, self.costs)

    def remaining(self) -> float | None:
        """Estimate the seconds of the runs that are missing; None where the arms have not been measured.

        Raises:
            ConfigError: the folder holds runs with other settings.
        """
        seconds: list[float | None] = []
        for seed in range(self.study.seeds):
            missing = [arm for arm in self.arms if not is_finished(self.run_folder(arm, seed), self.config(arm, seed))]
            seconds.append(self.seconds_of({arm.name: self.config(arm, seed).steps for arm in missing}, seeds=1))
        return None if None in seconds else sum(filter(None, seconds))

    @property
    def estimated(self) -> float | None:
        """Seconds that measuring took and all runs were to take; None if this was planned by an older version."""
        measuring = read_settings(self.folder / STUDY_FILE).get("measuring")
        runs = self.seconds_of({arm.name: self.config(arm, 0).steps for arm in self.arms}, self.study.seeds)
        return None if measuring is None or runs is None else measuring + runs

    @property
    def seconds(self) -> float:
        """Seconds that this ablation has taken so far, over all interruptions."""
        return float(read_settings(self.folder / STUDY_FILE).get("seconds", 0.0))

    @property
    def scored(self) -> bool:
        """Return whether runs are scored by what their videos show, which only `shapes` allows."""
        return self.study.prompts > 0 and self.study.base.data.source == "shapes"

    # -- planning --------------------------------------------------------------------------------------------------

    def _plan(self) -> list[Arm]:
        """Return the arms with all that follows from matching and budget, as saved where it is.

        Raises:
            ConfigError: the folder holds another study.
        """
        study, file = self.study, self.folder / STUDY_FILE
        request = {"match": study.match, "steps": study.steps, "minutes": study.minutes, "prompts": study.prompts}
        saved: dict[str, Any] = {"request": request, "arms": {}, "costs": {}, "measuring": 0.0}
        if file.is_file():
            saved = {"measuring": None} | read_settings(file)
            for key, value in request.items():
                if saved["request"][key] != value:
                    raise ConfigError(
                        f"{self.folder} holds an ablation with other settings ({key}: {saved['request'][key]}, now "
                        f"{value}): choose another folder with --out"
                    )
        known = {name: Arm(name, settings) for name, settings in saved["arms"].items()}
        self.costs = {name: Cost(**values) for name, values in saved["costs"].items()}
        new = [arm for arm in study.arms if arm.name not in known]
        if known and new and study.steps is None:
            raise ConfigError(
                f"{self.folder} was planned for {', '.join(known)}, without {new[0].name}: choose another folder with "
                "--out, or give --steps from the start"
            )
        if new:
            started = time.perf_counter()
            planned = self._matched(list(study.arms))
            known |= {arm.name: arm for arm in planned if arm.name not in known}
            saved["arms"] = {name: arm.settings for name, arm in known.items()}
            saved["costs"] = {name: asdict(cost) for name, cost in self.costs.items()}
            if saved["measuring"] is not None:  # else by an older version
                saved["measuring"] += time.perf_counter() - started
            self._save(saved)
        return [known[arm.name] for arm in study.arms]

    def _matched(self, arms: list[Arm]) -> list[Arm]:
        """Return the arms with parameters and length matched, after their costs have been measured."""
        study, started = self.study, time.perf_counter()
        if study.match == "parameters":
            target = estimate_arm(reference_arm(study.base, arms).config(study.base)).parameters
            arms = [with_parameters_matched(arm, study.base, target) for arm in arms]
        log.info(f"measuring a few steps of {', '.join(arm.name for arm in arms)}, in turns")
        self.costs |= measure_costs(arms, self._measured_trainer)
        minutes = study.minutes and study.minutes - (time.perf_counter() - started) / 60  # what measuring has left
        return with_length(study, arms, minutes, self.costs)

    def _measured_trainer(self, arm: Arm, run: RunFolder) -> Trainer:
        config = measured(self.config(arm, seed=0))
        run.create(config)
        components = self._load_components(config)
        model = self._build_model(config, components)
        return self._build_trainer(config, run, model, components, NullCallback())

    def _save(self, saved: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create {self.folder}: {error.strerror}; choose another --out") from error
        replace_text(self.folder / STUDY_FILE, json.dumps(saved, indent=1) + "\n")

    # -- running ---------------------------------------------------------------------------------------------------

    def _run(self, arm: Arm, seed: int, watch: Callable[[Arm, int], Callback]) -> bool:
        """Train and score one run, as far as that is missing; returns False if interrupted."""
        run, config = self.run_folder(arm, seed), self.config(arm, seed)
        if not is_finished(run, config) and not self._train(arm, seed, watch(arm, seed)):
            return False
        if self.scored and DIVERGED not in run.metadata() and not (run.path / SCORES).exists():
            self._score(run)
        return True

    def _train(self, arm: Arm, seed: int, watcher: Callback) -> bool:
        """Train one run, from its last checkpoint where it has one; returns False if interrupted."""
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
            return not trainer.train().interrupted
        except Diverged:  # a result like any other: the other arms are trained
            run.update_metadata(**{DIVERGED: trainer.step})
            log.info(f"{run.path.name}: diverged, {config.max_skipped} steps before {trainer.step} were not finite")
            return True

    def _trainer(self, seed: int, config: TrainConfig, run: RunFolder, watcher: Callback) -> Trainer:
        components = self._load_components(config)
        reference = reference_arm(self.study.base, self.arms)  # first, so that it starts the same beside any others
        arms = [reference, *(arm for arm in self.arms if arm is not reference)]
        configs = [self.config(arm, seed) for arm in arms]
        model, share = share_initial_weights(
            self._build_model(other, self._load_components(other)) for other in configs[: configs.index(config) + 1]
        )
        if config.init is not None:
            log.info(load_initial(model, config.init))
        run.update_metadata(same_start=round(share, 4))
        return self._build_trainer(config, run, model, components, watcher)

    def _build_trainer(
        self, config: TrainConfig, run: RunFolder, model: STDiT, components: Components, watcher: Callback
    ) -> Trainer:
        dataset, validation, prompts = self._open_datasets(config, components)
        task = STDiTTask(config, cast(STDiT, model.to(self.device)), components, prompts, self.device, World())
        return Trainer(config, run, task, dataset, validation, self.device, watcher)

    @staticmethod
    def _build_model(config: TrainConfig, components: Components) -> STDiT:
        return build_model(config, latent_channels(components.vae), components.text_encoder.config.d_model)

    def _load_components(self, config: TrainConfig) -> Components:
        key = (config.data.vae, config.data.text_encoder, config.precision)
        if key not in self._components:
            self._components[key] = load_components(
                config.data.vae, config.data.text_encoder, self.device, config.precision
            )
        return self._components[key]

    def _open_datasets(
        self, config: TrainConfig, components: Components
    ) -> tuple[ClipDataset, ClipDataset | None, list[str]]:
        """Open a run's data sets; latents that are kept in memory are encoded once for all arms that share them."""
        dataset, validation, prompts = build_datasets(config)
        if isinstance(dataset, LatentDataset):
            check_components(dataset, components)
        elif config.data.cache_latents:
            key = (config.seed, config.data)
            if self._shared is None or self._shared[0] != key:
                self._shared = key, cached_in_memory(dataset, components.vae, self.device)
            dataset = self._shared[1]
        return dataset, validation, prompts

    def _score(self, run: RunFolder) -> None:
        """Score a finished run by prompt following, with the same prompts and noise for all."""
        log.info(f"{run.path.name}: sampling {self.study.prompts} seen and {self.study.prompts} held-out prompts")
        pipeline = load_pipeline(str(run.path))
        splits: dict[str, Any] = {"seen": "train", "held-out": "heldout"}
        scores = {name: evaluate_pipeline(pipeline, split, self.study.prompts) for name, split in splits.items()}
        settings = {"checkpoint": str(run.path), "prompts": self.study.prompts, "seed": 0}
        write_scores(scores, settings, run.path / SCORES)


def is_finished(run: RunFolder, config: TrainConfig) -> bool:
    """Tell whether a run has reached its end, or diverged.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    if not run.config_file.exists():
        return False
    saved = from_dict(run.read_config())
    if saved != config:
        theirs, ours = flatten(to_dict(saved)), flatten(to_dict(config))
        key = next(key for key in ours if ours[key] != theirs[key])
        raise ConfigError(
            f"{run.path} holds a run with other settings ({key}: {theirs[key]}, now {ours[key]}): "
            "choose another folder with --out"
        )
    return DIVERGED in run.metadata() or (run.finished and (run.pipeline / "model_index.json").exists())
