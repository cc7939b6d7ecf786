"""Samplers by name: the diffusers schedulers that fit an objective, keeping the checkpoint's noise schedule."""

from typing import Any

FLOW_SAMPLERS = ("euler",)
EPSILON_SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc")


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
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        "ddpm": (diffusers.DDPMScheduler, {"variance_type": "learned_range", "timestep_spacing": "linspace"}),
        "ddim": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        "dpmsolver++": (
            diffusers.DPMSolverMultistepScheduler,
            {"variance_type": None, "algorithm_type": "dpmsolver++"},
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
    }
    cls, settings = classes[name]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **settings)
