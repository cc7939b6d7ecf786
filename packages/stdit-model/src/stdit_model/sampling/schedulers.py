"""Samplers by name: the diffusers schedulers that fit an objective, keeping the checkpoint's noise schedule.

And what "as the reference does it" means, by its name.
"""

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

FLOW_SAMPLERS = ("euler",)


EPSILON_SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc")


# Sampling as the reference releases do it. Each is a sampler and arguments of `STDiTPipeline.__call__`. Beside these,
# the unconditional half always has the null caption under its prompt's mask, as Open-Sora 1.0 has it.
COMPAT: dict[str, dict[str, Any]] = {
    "open-sora-1.0": {
        "sampler": "ddpm",
        "num_inference_steps": 100,
        "guidance_scale": 7.0,
        "guidance_channels": 3,  # of 4: the last one is the prompt's half's
    },
}


def compat(name: str) -> dict[str, Any]:
    """The sampler and the arguments of a reference.

    Raises:
        ValueError: none of that name.
    """
    if name not in COMPAT:
        raise ValueError(f"--compat {name}: choose {', '.join(COMPAT)}")
    return dict(COMPAT[name])


def sampler_name(scheduler: Any) -> str:
    """What `use_sampler` calls a scheduler."""
    names = {
        "FlowMatchEulerDiscreteScheduler": "euler",
        "DDPMScheduler": "ddpm",
        "DDIMScheduler": "ddim",
        "DPMSolverMultistepScheduler": "dpmsolver++",
        "UniPCMultistepScheduler": "unipc",
    }
    return names.get(type(scheduler).__name__, type(scheduler).__name__)


def use_sampler(pipeline: Any, name: str) -> None:
    """Replace a pipeline's scheduler.

    Raises:
        ValueError: no such sampler, or one for the other objective.
    """
    import diffusers

    flow = "FlowMatch" in type(pipeline.scheduler).__name__
    fitting = FLOW_SAMPLERS if flow else EPSILON_SAMPLERS
    if name not in fitting:
        kind = "rectified flow" if flow else "epsilon prediction"
        raise ValueError(f"sampler {name!r}: this checkpoint was trained with {kind}; choose {', '.join(fitting)}")
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


def iddpm_scheduler() -> DDPMScheduler:
    """The sampler of Open-Sora 1.0: iDDPM's ancestral steps with a learned variance, evenly spaced from 999 to 0."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of rectified flow, timesteps 1000 * sigma."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
