"""STDiTPipeline: a prompt in, frames out.

Legend: B videos, C latent channels, T frames, H W height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_model import video_vae
from stdit_model.conveniences import Conveniences, as_frames
from stdit_model.model import STDiT
from stdit_model.sampling.continuation import Window, plan_windows
from stdit_model.sampling.denoise import Denoiser
from stdit_model.sampling.folder import check_parts, named_parts
from stdit_model.sampling.prompts import Prompting


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """`frames`: what `output_type` asked for, see `STDiTPipeline.__call__`."""

    frames: Any


class STDiTPipeline(Prompting, Conveniences, DiffusionPipeline):
    """Text to video with an STDiT, any diffusers scheduler, a VAE and a T5-style text encoder.

    Args:
        transformer: the denoiser.
        vae: a diffusers image VAE (used frame by frame) or video VAE.
        text_encoder, tokenizer: T5EncoderModel and its tokenizer; None where `prompt_embeds` will be given.
        scheduler: FlowMatchEulerDiscreteScheduler for rectified-flow models; DDPM, DDIM, DPM-Solver++ or UniPC for
            epsilon models.
        num_frames, height, width, fps: the clips that the checkpoint was trained on, the defaults of a call.
        num_inference_steps, guidance_scale: the defaults of a call.
        settling: likewise; 0 for a model that was trained to go on from given frames.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  (diffusers reads it from the class)
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

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
        settling: int = 3,
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
            settling=settling,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "STDiTPipeline":
        """A pipeline that `save_pretrained` or `stdit weights convert` wrote, or one on the Hub.

        Args:
            pretrained_model_name_or_path: its folder, or a Hub id.
            options: of diffusers' `DiffusionPipeline.from_pretrained`; components by name, such as `vae=...`, replace
                the folder's. `text_encoder=None, tokenizer=None` leaves them out.

        Raises:
            FileNotFoundError: nothing is there, or a part is missing.
            WeightsError: a part can't be read.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            options = {**named_parts(folder, options), **options}
            check_parts(folder, options)
        elif str(folder).startswith((".", "/", "~")) or str(pretrained_model_name_or_path).count("/") != 1:
            raise FileNotFoundError(f"{folder}: no such folder; expected a pipeline folder or a Hub id (owner/name)")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_released(cls, path_or_hub_id: str | Path, **options: Any) -> "STDiTPipeline":
        """A pipeline around bare weights, such as OpenSora-v1-HQ-16x512x512.pth.

        See `stdit_model.sampling.released.assemble`.

        The model's sizes are read from the file; VAE, text encoder and tokenizer are those that it was trained with,
        from the Hub or where `vae=` and `text_encoder=` say.
        """
        from stdit_model.sampling.released import assemble

        return assemble(cls, path_or_hub_id, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        first_frames: Tensor | None = None,
        settling: int | None = None,
        window: int | None = None,
        overlap: int | None = None,
        guide_going_on: bool = False,
        space_scale: float | None = None,
        time_scale: float | None = None,
        output_type: str = "pt",
        decode_chunk_size: int = 16,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> STDiTPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            prompt: one or several.
            negative_prompt: what guidance moves away from; the null caption unless given.
            num_frames, height, width: size of the clips in frames and pixels; the checkpoint's own unless given.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 turns it off.
            guidance_rescale: 0 to 1, see `stdit_model.sampling.denoise.guide`.
            guidance_interval: the share of the steps in which guidance acts, as in (0.1, 0.7); outside, a step costs
                half (arXiv:2404.07724).
            guidance_channels: guide only the first so many latent channels and take the others from the prompt's
                half; Open-Sora 1.0 guides 3 of its 4.
            num_videos_per_prompt: videos of each prompt, side by side in the output.
            generator: one, or one for each video: then a video does not depend on what else is asked for.
            latents: starting noise [B, C, T, H, W] in place of a generator's.
            prompt_embeds, prompt_attention_mask: what `encode_prompt` gave, [B, L, Dc] and [B, L], in place of
                `prompt`: the text encoder is then not needed.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise; the null caption unless given.
            first_frames: pixels [3, K, H, W] or [B, 3, K, H, W] in [-1, 1] that the videos begin with.
            settling: with given frames, evaluations of the model that each step spends on fitting the new ones to them,
                see `stdit_model.sampling.continuation`; the checkpoint's own number unless given.
            window: frames sampled at once; longer videos are made window by window, each going on from the one
                before. Without it all frames are sampled together.
            overlap: frames of the past that a window goes on from; half a window unless given.
            guide_going_on: guide windows that go on from two or more frames, too. By default these lead alone: the
                prompt's guidance pulls away from them, to where such videos usually begin.
            space_scale, time_scale: position scales; the model's own unless given.
            output_type: "pt", [B, 3, T, H, W] float32 in [-1, 1]; "np", [B, T, H, W, 3] float32 in [0, 1];
                "pil", a list of images for each video; "latent", [B, C, T, H, W].
            decode_chunk_size: frames that an image VAE decodes at once.
            callback_on_step_end: called as (pipeline, step index, timestep, {"latents": ...}) after each step; what it
                returns under "latents" replaces them. The index counts on from window to window.
            callback_on_step_end_tensor_inputs: "latents", or nothing.
            return_dict: a plain tuple when false.

        Raises:
            ValueError: an empty prompt, a size that VAE and patch do not divide, an unknown output type, given frames
                of another size.
        """
        self._check(output_type, guidance_interval, guidance_rescale)
        config = self.config
        clip = (num_frames or config.num_frames, height or config.height, width or config.width)
        shape = video_vae.latent_shape(self.vae, *clip)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        embeds = self.encode_prompt(
            prompt, negative_prompt, num_videos_per_prompt, scale != 1.0, prompt_embeds, prompt_attention_mask,
            negative_prompt_embeds, negative_prompt_attention_mask,
        )  # fmt: skip
        noise = self.prepare_latents(latents, (len(embeds[0]), *shape), generator, self._execution_device)
        made = None if first_frames is None else self._encode_first(first_frames, len(noise), clip)
        steps = num_inference_steps or config.num_inference_steps
        denoise = Denoiser(
            self.transformer, self.scheduler, self._cache_text(*embeds), steps, generator, scale, guidance_rescale,
            guidance_interval, guidance_channels, space_scale, time_scale,
            config.settling if settling is None else settling,
        )  # fmt: skip
        windows = self._windows(noise, made, window, overlap)

        self._guidance_scale, self._num_timesteps, self._interrupt = scale, steps * len(windows), False
        with self.progress_bar(total=self._num_timesteps) as bar:
            for number, (start, stop, known) in enumerate(windows):
                if self._interrupt:
                    break

                def after_step(i: int, t: Tensor, x: Tensor, before: int = number * steps) -> Tensor | None:
                    if callback_on_step_end is not None:
                        inputs = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                        x = (callback_on_step_end(self, before + i, t, inputs) or {}).get("latents", x)
                    bar.update()
                    return None if self._interrupt else x

                past = made[:, :, start : start + known] if made is not None and known else None
                led = known > 1 and not guide_going_on
                x = (denoise.unguided(len(noise)) if led else denoise)(noise[:, :, start:stop], past, after_step)
                made = x if made is None else torch.cat([made, x[:, :, known:]], dim=2)
        assert made is not None

        if output_type == "latent":
            frames: Any = made
        else:
            video = video_vae.decode(self.vae, made, decode_chunk_size)
            if first_frames is not None:  # as they were given, not as they come out of the VAE
                video[:, :, : first_frames.shape[-3]] = first_frames.to(video)
            frames = as_frames(output_type, video)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames) if return_dict else (frames,)

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

    def _check(self, output_type: str, interval: tuple[float, float], rescale: float) -> None:
        if output_type not in ("pt", "np", "pil", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}: choose pt, np, pil or latent")
        if not 0.0 <= interval[0] < interval[1] <= 1.0:
            raise ValueError(f"guidance_interval {interval}: expected two shares of the steps, as in (0.1, 0.7)")
        if not 0.0 <= rescale <= 1.0:
            raise ValueError(f"guidance_rescale {rescale}: expected 0 to 1")

    def _encode_first(self, first_frames: Tensor, batch: int, clip: tuple[int, int, int]) -> Tensor:
        """Given pixels as latents, the posterior's mean: [B, C, K, H, W]."""
        frames = first_frames if first_frames.ndim == 5 else first_frames[None]
        if frames.ndim != 5 or frames.shape[1] != 3 or tuple(frames.shape[-2:]) != clip[1:]:
            raise ValueError(
                f"first_frames of shape [3, K, {clip[1]}, {clip[2]}] expected, not {list(first_frames.shape)}"
            )
        if frames.shape[2] >= clip[0]:
            raise ValueError(f"first_frames: {frames.shape[2]} frames, and {clip[0]} in all leave nothing to make")
        frames = frames.expand(batch, -1, -1, -1, -1).to(self._execution_device)
        return video_vae.sample_latents(self.vae, video_vae.encode_moments(self.vae, frames))

    def _windows(self, noise: Tensor, made: Tensor | None, window: int | None, overlap: int | None) -> list[Window]:
        """In latent frames; a single one without `window`."""
        total, known = noise.shape[2], 0 if made is None else made.shape[2]
        if window is None or window >= total:
            return [Window(0, total, known)]

        def latent_frames(pixels: int) -> int:
            return video_vae.latent_frames(self.vae, pixels)

        length = latent_frames(window)
        return plan_windows(total, known, length, length // 2 if overlap is None else latent_frames(overlap))


STDiTPipeline.__module__ = "stdit_model"
