"""Choose a diffusers scheduler by name, its timesteps and noise levels; and the settings of reference releases."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stdit_model.errors import SettingsError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    from stdit_model.diffusion import NoiseLevel, Prediction

FLOW_SAMPLERS = ("euler", "dpmsolver++", "unipc")
EPSILON_SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
SAMPLERS = ("euler", *EPSILON_SAMPLERS)

# Sampling settings of reference releases: a sampler and arguments of `STDiTPipeline.__call__`. The unconditional half
# always has the null caption under the prompt's mask, as in Open-Sora 1.0.
COMPAT: dict[str, dict[str, Any]] = {
    "open-sora-1.0": {
        "sampler": "ddpm",
        "num_inference_steps": 100,
        "guidance_scale": 7.0,
        "guidance_channels": 3,  # of 4: the last one is the conditional prediction's
    },
}


def compat(name: str) -> dict[str, Any]:
    """Return the sampling settings of a reference release.

    Raises:
        SettingsError: no such release.
    """
    if name not in COMPAT:
        raise SettingsError(f"compat {name}: choose {', '.join(COMPAT)}")
    return dict(COMPAT[name])


def sampler_name(scheduler: Any) -> str:
    """Return the name that `use_sampler` has for a scheduler, or its class."""
    names = {
        "FlowMatchEulerDiscreteScheduler": "euler",
        "DDPMScheduler": "ddpm",
        "DDIMScheduler": "ddim",
        "DPMSolverMultistepScheduler": "dpmsolver++",
        "UniPCMultistepScheduler": "unipc",
    }
    return names.get(type(scheduler).__name__, type(scheduler).__name__)


def check_sampler(name: str, flow: bool | None = None) -> None:
    """Check a sampler's name and, if the objective is known, that it is one for it.

    Args:
        name: one of `SAMPLERS`.
        flow: whether the model was trained with rectified flow, else with iDDPM, to predict epsilon or v; None if not
            known.

    Raises:
        SettingsError: no such sampler, or one for the other objective.
    """
    if name not in SAMPLERS:
        raise SettingsError(f"sampler {name}: choose {', '.join(SAMPLERS)}")
    fitting = SAMPLERS if flow is None else FLOW_SAMPLERS if flow else EPSILON_SAMPLERS
    if name not in fitting:
        kind = "rectified flow" if flow else "epsilon or v prediction"
        raise SettingsError(f"sampler {name}: this checkpoint was trained with {kind}; choose {', '.join(fitting)}")


def use_sampler(pipeline: Any, name: str) -> None:
    """Replace a pipeline's scheduler, keeping the noise schedule of its checkpoint.

    Raises:
        SettingsError: no such sampler, or one for the other objective.
    """
    import diffusers

    config = pipeline.scheduler.config
    flow = predicts_velocity(pipeline.scheduler)
    check_sampler(name, flow)
    variance = "learned_range" if pipeline.transformer.config.learn_sigma else "fixed_small"
    unclipped = {"clip_sample": False, "thresholding": False}  # latents are not limited to -1..1
    multistep: dict[str, Any] = {}
    if flow:
        shift = config.get("flow_shift", 1.0) if config.get("use_flow_sigmas") else config.get("shift", 1.0)
        multistep = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": multistep.get("flow_shift")}),
        "ddpm": (diffusers.DDPMScheduler, {"variance_type": variance, "timestep_spacing": "linspace", **unclipped}),
        "ddim": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True, **unclipped}),
        "dpmsolver++": (
            diffusers.DPMSolverMultistepScheduler,
            {"variance_type": None, "algorithm_type": "dpmsolver++", **multistep},
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, multistep),
    }
    cls, settings = classes[name]
    known = inspect.signature(cls.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known}
    pipeline.scheduler = cls.from_config({**kept, **{key: value for key, value in settings.items() if key in known}})


def predicts_velocity(scheduler: Any) -> bool:
    """Whether a diffusers scheduler takes the velocity of rectified flow; others take epsilon or v."""
    return hasattr(scheduler, "scale_noise") or scheduler.config.get("prediction_type") == "flow_prediction"


def recorded_objective(class_name: str, config: Mapping[str, Any] | None) -> bool | None:
    """Return whether a saved scheduler takes the velocity of rectified flow, without loading it.

    Args:
        class_name: its diffusers class.
        config: its scheduler_config.json; None if it is not at hand.

    Returns:
        None if only its configuration would tell.
    """
    if "FlowMatch" in class_name:
        return True
    if config is None:
        return None if class_name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler") else False
    return config.get("prediction_type") == "flow_prediction"


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Choose the timesteps of a scheduler, which stay on the CPU: on a GPU each step would wait for them.

    The noise levels of rectified flow are even before the shift, from 1 to 1 / steps, as in training.
    FlowMatchEulerDiscreteScheduler's own would be shifted twice (1, 0.0158 and 0 for two steps at shift 4).
    """
    import numpy as np

    options: dict[str, Any] = {}
    if predicts_velocity(scheduler) and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        options["sigmas"] = 1.0 - np.arange(steps) / steps
    scheduler.set_timesteps(steps, **options)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for the first timestep, and takes the second of two equal ones


def model_timestep(scheduler: Any, step: int) -> float:
    """Return the timestep that the model gets in a step: 1000 * sigma for rectified flow, which is not rounded."""
    if predicts_velocity(scheduler):
        return float(scheduler.sigmas[step] * scheduler.config.num_train_timesteps)
    return float(scheduler.timesteps[step])


def noise_level(scheduler: Any, step: int) -> "NoiseLevel":
    """Return the noise level of a step, for a scheduler that `check_continuation` accepts and whose timesteps are set.

    It is that of the scheduler's sigmas, where it has some: its timesteps are rounded.
    """
    from stdit_model.diffusion import NoiseLevel

    if predicts_velocity(scheduler):
        sigma = float(scheduler.sigmas[step])
        return NoiseLevel(1.0 - sigma, sigma, "flow_prediction")
    if hasattr(scheduler, "sigmas"):  # noise / signal
        alpha_bar = 1.0 / (1.0 + float(scheduler.sigmas[step]) ** 2)
    else:
        alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    return NoiseLevel(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, scheduler.config.get("prediction_type", "epsilon"))


def check_continuation(scheduler: Any) -> None:
    """Check that the noise levels of a scheduler are known, which continuing conditioning frames needs.

    They are for rectified flow, and for prediction of epsilon or v that keeps the variance (signal^2 + noise^2 = 1).

    Raises:
        SettingsError: another scheduler, such as EulerDiscreteScheduler, whose latents grow with the noise.
    """
    config = scheduler.config
    if predicts_velocity(scheduler):
        known = hasattr(scheduler, "scale_noise") or config.get("use_flow_sigmas", False)
        known = known and not config.get("invert_sigmas", False)
    else:
        known = hasattr(scheduler, "alphas_cumprod") and config.get("prediction_type", "epsilon") in (
            "epsilon",
            "v_prediction",
        )
        known = known and float(scheduler.init_noise_sigma) == 1.0
    if not known:
        raise SettingsError(
            f"{type(scheduler).__name__} with these settings cannot continue given frames or windows: its noise levels "
            f"are not known; choose another sampler ({', '.join(SAMPLERS)})"
        )


def iddpm_scheduler(prediction: "Prediction" = "epsilon", zero_terminal_snr: bool = False) -> "DDPMScheduler":
    """Return the scheduler of Open-Sora 1.0: iDDPM's ancestral steps with a learned variance, from 999 to 0.

    Args:
        prediction: what the model predicts, "epsilon" or "v_prediction".
        zero_terminal_snr: whether it was trained with noise alone at timestep 999.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def flow_scheduler() -> "FlowMatchEulerDiscreteScheduler":
    """Return the scheduler of rectified flow: Euler steps, timesteps 1000 * sigma."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
