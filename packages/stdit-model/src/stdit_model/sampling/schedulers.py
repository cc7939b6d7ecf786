"""Choose a diffusers scheduler by name, and the sampling settings of reference releases."""

from typing import TYPE_CHECKING, Any

from stdit_model.errors import SettingsError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

FLOW_SAMPLERS = ("euler",)
EPSILON_SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
SAMPLERS = FLOW_SAMPLERS + EPSILON_SAMPLERS

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
        flow: whether the model was trained with rectified flow, else to predict epsilon; None if not known.

    Raises:
        SettingsError: no such sampler, or one for the other objective.
    """
    if name not in SAMPLERS:
        raise SettingsError(f"sampler {name}: choose {', '.join(SAMPLERS)}")
    fitting = SAMPLERS if flow is None else FLOW_SAMPLERS if flow else EPSILON_SAMPLERS
    if name not in fitting:
        kind = "rectified flow" if flow else "epsilon prediction"
        raise SettingsError(f"sampler {name}: this checkpoint was trained with {kind}; choose {', '.join(fitting)}")


def use_sampler(pipeline: Any, name: str) -> None:
    """Replace a pipeline's scheduler, keeping the noise schedule of its checkpoint.

    Raises:
        SettingsError: no such sampler, or one for the other objective.
    """
    import diffusers

    check_sampler(name, "FlowMatch" in type(pipeline.scheduler).__name__)
    variance = "learned_range" if pipeline.transformer.config.learn_sigma else "fixed_small"
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        "ddpm": (diffusers.DDPMScheduler, {"variance_type": variance, "timestep_spacing": "linspace"}),
        "ddim": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        "dpmsolver++": (
            diffusers.DPMSolverMultistepScheduler,
            {"variance_type": None, "algorithm_type": "dpmsolver++"},
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
    }
    cls, settings = classes[name]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **settings)


def iddpm_scheduler() -> "DDPMScheduler":
    """Return the scheduler of Open-Sora 1.0: iDDPM's ancestral steps with a learned variance, from 999 to 0."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )


def flow_scheduler() -> "FlowMatchEulerDiscreteScheduler":
    """Return the scheduler of rectified flow: Euler steps, timesteps 1000 * sigma."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
