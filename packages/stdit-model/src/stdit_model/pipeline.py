"""STDiTPipeline: a prompt in, frames out.

Legend: B videos, C latent channels, T frames, H W height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_model import video_vae
from stdit_model.convert import HUB_COMPONENTS
from stdit_model.errors import WeightsError
from stdit_model.hub import split_hub_id
from stdit_model.lazy import read_json
from stdit_model.model import STDiT
from stdit_model.text import encode_captions


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """`frames`: what `output_type` asked for, see `STDiTPipeline.__call__`."""

    frames: Any


class STDiTPipeline(DiffusionPipeline):
    """Text to video with an STDiT, any diffusers scheduler, a VAE and a T5-style text encoder.

    Args:
        transformer: the denoiser.
        vae: a diffusers image VAE (used frame by frame) or video VAE.
        text_encoder, tokenizer: T5EncoderModel and its tokenizer.
        scheduler: FlowMatchEulerDiscreteScheduler for rectified-flow models; DDPM, DDIM, DPM-Solver++ or UniPC for
            epsilon models.
        num_frames, height, width, fps: the clips that the checkpoint was trained on, the defaults of a call.
        num_inference_steps, guidance_scale: the defaults of a call.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  (diffusers reads it from the class)

    def __init__(
        self,
        transformer: STDiT,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        num_frames: int = 16,
        height: int = 256,
        width: int = 256,
        fps: float = 8,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "STDiTPipeline":
        """A pipeline that `save_pretrained` or `stdit weights convert` wrote, or one on the Hub.

        Args:
            pretrained_model_name_or_path: its folder, or a Hub id.
            options: of diffusers' `DiffusionPipeline.from_pretrained`; components by name, such as `vae=...`, replace
                the folder's.

        Raises:
            FileNotFoundError: nothing is there, or a part is missing.
            WeightsError: a part can't be read.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            options = {**_named_parts(folder, options), **options}
            _check_parts(folder, options)
        elif str(folder).startswith((".", "/", "~")) or str(pretrained_model_name_or_path).count("/") != 1:
            raise FileNotFoundError(f"{folder}: no such folder; expected a pipeline folder or a Hub id (owner/name)")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        guidance_channels: int | None = None,
        space_scale: float | None = None,
        time_scale: float | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        return_dict: bool = True,
    ) -> STDiTPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            prompt: one or several.
            negative_prompt: what guidance moves away from; the null caption unless given.
            num_frames, height, width: size of the clips in frames and pixels; the checkpoint's own unless given.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 turns it off.
            num_videos_per_prompt: videos of each prompt, side by side in the output.
            generator: one, or one for each video: then a video does not depend on what else is asked for.
            latents: starting noise [B, C, T, H, W] in place of a generator's.
            output_type: "pt", [B, 3, T, H, W] float32 in [-1, 1]; "np", [B, T, H, W, 3] float32 in [0, 1];
                "pil", a list of images for each video; "latent", [B, C, T, H, W].
            guidance_channels: guide only the first so many latent channels and take the others from the prompt's
                half; Open-Sora 1.0 guides 3 of its 4.
            space_scale, time_scale: position scales; the model's own unless given.
            callback_on_step_end: called as (pipeline, step index, timestep, {"latents": ...}) after each step; what it
                returns under "latents" replaces them.
            return_dict: a plain tuple when false.

        Raises:
            ValueError: an empty prompt, a size that VAE and patch do not divide, an unknown output type.
        """
        if output_type not in ("pt", "np", "pil", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}: choose pt, np, pil or latent")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(p.strip() for p in prompts):
            raise ValueError("the prompt is empty: say what the video should show")
        prompts = [p for p in prompts for _ in range(num_videos_per_prompt)]
        config = self.config
        guidance = config.guidance_scale if guidance_scale is None else guidance_scale
        num_frames = num_frames or config.num_frames
        shape = video_vae.latent_shape(self.vae, num_frames, height or config.height, width or config.width)
        device = self._execution_device
        guided = guidance != 1.0

        text = self.encode_prompt(prompts, negative_prompt, guided)
        latents = self.prepare_latents(latents, (len(prompts), *shape), generator, device)
        self.scheduler.set_timesteps(num_inference_steps or config.num_inference_steps, device=device)

        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                scale_input = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
                x = scale_input(latents, t).to(self.transformer.dtype)
                if guided:
                    x = torch.cat([x, x])
                timestep = t.expand(len(x)).to(device)
                output = self.transformer(x, timestep, text, space_scale=space_scale, time_scale=time_scale).float()
                if guided:
                    output = guide(output, guidance, guidance_channels or latents.shape[1])
                if not _learns_variance(self.scheduler):
                    output = output[:, : latents.shape[1]]
                latents = self._step(output, t, latents, generator)
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).get("latents", latents)
                bar.update()

        frames = latents if output_type == "latent" else _as(output_type, video_vae.decode(self.vae, latents))
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames) if return_dict else (frames,)

    def encode_prompt(self, prompts: list[str], negative_prompt: str | Sequence[str] | None, guided: bool) -> Any:
        """The text as the transformer's blocks read it, a `TextCache`; with guidance the unconditional half follows.

        The null caption keeps the mask of its prompt, as caption dropout does in training.
        """
        length = self.transformer.config.model_max_length
        y, mask = encode_captions(self.tokenizer, self.text_encoder, prompts, length)
        if guided:
            if negative_prompt is None:
                negative_y, negative_mask = self.transformer.null_caption(len(y), length).to(y), mask
            else:
                negatives = [negative_prompt] * len(y) if isinstance(negative_prompt, str) else list(negative_prompt)
                if len(negatives) != len(y):
                    repeat = len(y) // len(negatives)
                    negatives = [n for n in negatives for _ in range(repeat)]
                negative_y, negative_mask = encode_captions(self.tokenizer, self.text_encoder, negatives, length)
            y, mask = torch.cat([y, negative_y]), torch.cat([mask, negative_mask])
        device = self._execution_device
        return self.transformer.encode_text(y.to(device, self.transformer.dtype), mask.to(device))

    def prepare_latents(
        self,
        latents: Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        """The starting noise, float32 [B, C, T, H, W]."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {list(shape)} expected, not {list(latents.shape)}")
        return latents.to(device) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _step(self, output: Tensor, t: Any, latents: Tensor, generator: Any) -> Tensor:
        """One scheduler step; ancestral samplers draw from the generator."""
        if generator is not None and "generator" in self.scheduler.step.__code__.co_varnames:
            return self.scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
        return self.scheduler.step(output, t, latents, return_dict=False)[0]


def _named_parts(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The components that an index names by Hub id (`stdit weights convert` writes such) and that are not given.

    Raises:
        WeightsError: the Hub does not give one; the message says what to download or to pass.
    """
    index = folder / "model_index.json"
    names = read_json(index).get(HUB_COMPONENTS, {}) if index.is_file() else {}
    return {part: _from_hub(part, name) for part, name in names.items() if part not in given}


def _from_hub(part: str, name: str) -> Any:
    import diffusers
    import transformers

    classes = {
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.T5EncoderModel,
        "tokenizer": transformers.AutoTokenizer,
        "scheduler": diffusers.DDPMScheduler,
    }
    repo, subfolder = split_hub_id(name) or (name, "")
    try:
        return classes[part].from_pretrained(repo, **({"subfolder": subfolder} if subfolder else {}))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{part} {name}: not to be had ({reason}); download it where there is a network (hf download {repo}), "
            f"or convert again with --{part.replace('_', '-')} FOLDER"
        ) from error


def _check_parts(folder: Path, given: dict[str, Any]) -> None:
    """Every part that the index names is there.

    Raises:
        FileNotFoundError: no index, or a part is missing; all missing parts are named.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json in it, so not a pipeline folder")
    named = {name for name, value in read_json(index).items() if isinstance(value, list) and value[0] is not None}
    expected = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    missing = sorted(
        part for part in expected - set(given) if part in named and not any((folder / part).glob("*.json"))
    )
    unnamed = sorted(expected - set(given) - named)
    if missing or unnamed:
        raise FileNotFoundError(
            f"{folder}: this pipeline folder lacks {', '.join(missing + unnamed)}; copy or download it again, whole"
        )


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance on the first `channels` channels: [2B, C', T, H, W] -> [B, C', T, H, W].

    The first half of the batch is the prompts', the second the unconditional one. All other channels (variance) are
    the prompts'.
    """
    conditional, unconditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def _learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler wants epsilon and variance; the others keep the setting and take epsilon alone."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") in (
        "learned",
        "learned_range",
    )


def _as(output_type: str, video: Tensor) -> Any:
    """A decoded video [B, 3, T, H, W] in [-1, 1] as the caller wants it."""
    if output_type == "pt":
        return video
    array = (video / 2 + 0.5).permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype("uint8")]


STDiTPipeline.__module__ = "stdit_model"
