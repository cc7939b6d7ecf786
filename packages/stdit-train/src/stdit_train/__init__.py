"""Train, evaluate and compare STDiT video diffusion models: `from stdit_train import load_stage, open_trainer`.

Names are imported when they are first used, so that `import stdit_train` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdit_train.build import open_trainer
    from stdit_train.config.load import load_curriculum, load_stage
    from stdit_train.config.resolve import resolve_config
    from stdit_train.config.schema import TrainConfig
    from stdit_train.errors import ConfigError, RunEnded
    from stdit_train.estimate.training import estimate_run
    from stdit_train.evaluation.evaluate import evaluate_pipeline
    from stdit_train.pipeline.export import export_run
    from stdit_train.pipeline.load import load_pipeline
    from stdit_train.trainer import Trainer

__all__ = [
    "ConfigError",
    "RunEnded",
    "TrainConfig",
    "Trainer",
    "estimate_run",
    "evaluate_pipeline",
    "export_run",
    "load_curriculum",
    "load_pipeline",
    "load_stage",
    "open_trainer",
    "resolve_config",
]

_MODULES = {
    "ConfigError": "stdit_train.errors",
    "RunEnded": "stdit_train.errors",
    "TrainConfig": "stdit_train.config.schema",
    "Trainer": "stdit_train.trainer",
    "estimate_run": "stdit_train.estimate.training",
    "evaluate_pipeline": "stdit_train.evaluation.evaluate",
    "export_run": "stdit_train.pipeline.export",
    "load_pipeline": "stdit_train.pipeline.load",
    "load_curriculum": "stdit_train.config.load",
    "load_stage": "stdit_train.config.load",
    "open_trainer": "stdit_train.build",
    "resolve_config": "stdit_train.config.resolve",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
