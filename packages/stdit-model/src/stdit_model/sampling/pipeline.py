"""STDiTPipeline: a prompt in, frames out.

Legend: B videos, C latent channels, T frames, K first frames, H W height and width, L text tokens.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor

from stdit_model import video_vae
from stdit_model.errors import SettingsError, WeightsError
from stdit_model.model import STDiT
from stdit_model.protocols import VAE, Scheduler, TextEncoder, Tokenizer
from stdit_model.sampling import prompts
from stdit_model.sampling.callbacks import TENSORS, Callback, CallState, StepEnd
from stdit_model.sampling.continuation import encode_first_frames, latent_windows
from stdit_model.sampling.denoise import Denoiser, Guidance
from stdit_model.sampling.folder import find_pipeline
from stdit_model.sampling.images import Frames, from_pil, to_output
from stdit_model.sampling.inputs import callback_inputs, check_inputs
from stdit_model.sampling.released import released_components
from stdit_model.sampling.schedulers import check_continuation
from stdit_model.weights.adapters import LoRALoader
from stdit_model.weights.hub import hub_reason


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """Output of `STDiTPipeline`; `frames` has the type that `output_type` asks for."""

    frames: Any


class STDiTPipeline(CallState, DiffusionPipeline, LoRALoader):
    """Text to video with an STDiT, any diffusers scheduler, a VAE and a T5-style text encoder.

    Args:
        transformer: the denoiser.
        vae: a diffusers image VAE (used frame by frame) or video VAE.
        text_encoder, tokenizer: T5EncoderModel and its tokenizer; None if calls pass `prompt_embeds`.
        scheduler: FlowMatchEulerDiscreteScheduler, or DPM-Solver++ or UniPC with flow sigmas, for rectified-flow
            models; DDPM, DDIM, DPM-Solver++ or UniPC for epsilon models.
        num_frames, height, width, fps: of the clips that the checkpoint was trained on; defaults of a call.
        num_inference_steps, guidance_scale: defaults of a call.
        negative_prompt: default of a call: None for a model that was trained with a null caption, as every STDiT is, ""
            for one that was not, as PixArt in diffusers' layout.
        single_frames: whether a model of clips was trained on single frames, too.
        resampling_steps: default of a call; 0 for a model that was trained to continue from conditioning frames.
        settling: deprecated name of `resampling_steps`, which saved pipelines may have.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = list(TENSORS)  # noqa: RUF012  (diffusers reads it from the class)
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: STDiT,
        vae: VAE,
        text_encoder: TextEncoder | None,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler,
        num_frames: int = 16,
        height: int = 256,
        width: int = 256,
        fps: int | float = 8,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        resampling_steps: int = 3,
        negative_prompt: str | None = None,
        single_frames: bool = False,
        settling: int | None = None,
    ) -> None:
        super().__init__()
        if settling is not None:  # quietly for saved pipelines, which diffusers passes on
            warnings.warn("settling is now resampling_steps", DeprecationWarning, stacklevel=2)
            resampling_steps = settling
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
            resampling_steps=resampling_steps,
            negative_prompt=negative_prompt,
            single_frames=single_frames,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "STDiTPipeline":
        """Load a pipeline that `save_pretrained` or `stdit weights convert` wrote, or a bundled one.

        `STDiTPipeline.from_pretrained("demo")` is the demo model that comes with stdit-train; see
        `stdit_model.sampling.bundled`. A local folder called demo takes precedence over it.

        Args:
            pretrained_model_name_or_path: its folder, the name of a bundled pipeline, or a Hub id.
            options: of diffusers' `DiffusionPipeline.from_pretrained`. Components by name, such as `vae=...`, replace
                those of the folder; `text_encoder=None, tokenizer=None` leaves them out.

        Raises:
            WeightsFileNotFoundError: no such folder or bundled pipeline, or a component is missing.
            WeightsError: a component cannot be read, or is not available from the Hub.
        """
        folder, options = find_pipeline(pretrained_model_name_or_path, options)
        try:
            return super().from_pretrained(folder, **options)
        except (OSError, SafetensorError) as error:
            why = hub_reason(error, folder)
            raise WeightsError(f"{folder}: cannot load this pipeline ({why}); copy or download it again") from error

    @classmethod
    def from_released(cls, path_or_hub_id: str | Path, **options: Any) -> "STDiTPipeline":
        """Build a pipeline around bare weights, such as OpenSora-v1-HQ-16x512x512.pth.

        The model's sizes are read from the file. VAE, text encoder and tokenizer are those that it was trained with,
        from the Hub unless `vae=` and `text_encoder=` name others.

        Args:
            path_or_hub_id: the file, or "owner/name/FILE.pth" on the Hub.
            options: of `stdit_model.sampling.released.released_components`.

        Raises:
            WeightsFileNotFoundError: no such file.
            WeightsError: the file cannot be read, or components are missing.
        """
        return cls(**released_components(path_or_hub_id, **options))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "STDiTPipeline":
        """Make another pipeline of the same components, with some of them or of the defaults of calls replaced.

        Args:
            pipeline: an `STDiTPipeline`.
            options: components by name, and dtype, which is the transformer's by default.
        """
        dtype = {} if {"dtype", "torch_dtype"} & options.keys() else {"torch_dtype": pipeline.transformer.dtype}
        return super().from_pipe(pipeline, **{**pipeline.components, **dtype, **options})

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along height and width."""
        return video_vae.spatial_stride(self.vae)

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
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_channels: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        first_frames: Frames | None = None,
        resampling_steps: int | None = None,
        window: int | None = None,
        overlap: int | None = None,
        guide_continuation: bool = False,
        space_scale: float | None = None,
        time_scale: float | None = None,
        output_type: str = "pt",
        decode_chunk_size: int = 16,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        settling: int | None = None,
    ) -> STDiTPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            prompt: one or several.
            negative_prompt: what guidance moves away from; the checkpoint's by default, the null caption if it has
                none.
            num_frames, height, width: size of the videos in frames and pixels; the checkpoint's by default.
            num_inference_steps: denoising steps; the checkpoint's by default.
            guidance_scale: of classifier-free guidance (arXiv:2207.12598), the checkpoint's by default; 1 turns it
                off.
            guidance_rescale: 0 to 1, see `stdit_model.sampling.denoise.guide`.
            guidance_start, guidance_stop: share of the steps after which guidance starts and stops, as in 0.1 and 0.7;
                steps without it cost half (arXiv:2404.07724).
            guidance_channels: guide only the first so many latent channels; the others are the prompt's. Open-Sora 1.0
                guides 3 of its 4.
            num_videos_per_prompt: videos of each prompt, adjacent in the output.
            generator: one, or one for each video, which makes a video independent of the others in its batch.
            latents: starting noise [B, C, T, H, W] in place of a generator's.
            prompt_embeds, prompt_attention_mask: [B, L, Dc] and [B, L] from `encode_prompt`, in place of `prompt`; the
                text encoder is then not needed.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise, in place of `negative_prompt`.
            first_frames: what the videos begin with: pixels [3, K, H, W] or [B, 3, K, H, W] in [-1, 1]; or a PIL image
                or a list of them, scaled to cover the size and centre-cropped.
            resampling_steps: evaluations of the model that each step spends on fitting the new frames to the first
                ones, see `stdit_model.sampling.continuation`; the checkpoint's by default.
            window: frames that are sampled at once. Longer videos are made window by window, each continuing the one
                before; by default all frames are one window.
            overlap: frames that consecutive windows share; half a window by default.
            guide_continuation: use guidance in windows that continue two or more frames, too. It is off there by
                default, since it pulls away from the motion of those frames, to where such videos usually begin.
            space_scale, time_scale: position scales; the model's by default.
            output_type: "pt", [B, 3, T, H, W] float32 in [-1, 1]; "np", [B, T, H, W, 3] float32 in [0, 1];
                "pil", a list of PIL images for each video, so that `frames[0][0]` is the first frame of the first;
                "latent", [B, C, T, H, W].
            decode_chunk_size: frames that an image VAE decodes at once.
            callback_on_step_end: called as (pipeline, step index, timestep, {"latents": ...}) after each step;
                "latents" in its result replaces them. The index runs over all windows. It may set
                `pipeline._interrupt = True` to stop, or `pipeline._guidance_scale`, as diffusers' SDCFGCutoffCallback
                does.
            callback_on_step_end_tensor_inputs: of "latents" and "prompt_embeds", which it may look at.
            return_dict: return a plain tuple if false.
            settling: deprecated name of `resampling_steps`.

        Raises:
            SettingsError: an argument out of range or of another size than its fellows, see
                `stdit_model.sampling.inputs`; an empty prompt, a size that is no multiple of VAE stride and patch,
                first frames of another size, or a scheduler that cannot continue them.
        """
        # 1. Check the arguments; take defaults from the checkpoint.
        if settling is not None:
            warnings.warn("settling is now resampling_steps", FutureWarning, stacklevel=3)  # beyond torch.no_grad
            resampling_steps = settling
        config = self.config

        def default(value: Any, name: str) -> Any:
            return config[name] if value is None else value

        clip = default(num_frames, "num_frames"), default(height, "height"), default(width, "width")
        steps = default(num_inference_steps, "num_inference_steps")
        self._guidance = Guidance(
            default(guidance_scale, "guidance_scale"),
            guidance_rescale,
            guidance_start,
            guidance_stop,
            guidance_channels,
        )
        texts: dict[str, Any] = {
            "prompt": (prompt, (prompt_embeds, prompt_attention_mask)),
            "negative_prompt": (negative_prompt, (negative_prompt_embeds, negative_prompt_attention_mask)),
        }
        counts = {
            "num_frames": clip[0], "height": clip[1], "width": clip[2], "num_inference_steps": steps,
            "num_videos_per_prompt": num_videos_per_prompt, "window": window, "overlap": overlap,
            "decode_chunk_size": decode_chunk_size,
        }  # fmt: skip
        scales = {"space_scale": space_scale, "time_scale": time_scale}
        check_inputs(self.transformer.config, texts, self._guidance, generator, output_type, counts, scales)
        names = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if first_frames is not None or (window is not None and window < clip[0]):
            check_continuation(self.scheduler)
        shape = video_vae.latent_shape(self.vae, *clip)
        device = self._execution_device

        # 2. Encode the prompts.
        embeds = self.encode_prompt(
            prompt, negative_prompt, num_videos_per_prompt, self.do_classifier_free_guidance, prompt_embeds,
            prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask,
        )  # fmt: skip

        # 3. Draw the starting noise, encode the first frames, plan the windows.
        if first_frames is not None and not isinstance(first_frames, Tensor):
            first_frames = from_pil(first_frames, *clip[1:])
        noise = self.prepare_latents(latents, (len(embeds.prompt_embeds), *shape), generator, device)
        done = None
        if first_frames is not None:
            done = encode_first_frames(self.vae, first_frames.to(device), len(noise), clip)
        windows = latent_windows(self.vae, noise.shape[2], 0 if done is None else done.shape[2], window, overlap)

        # 4. Denoise window by window.
        denoise = Denoiser(
            self.transformer,
            self.scheduler,
            prompts.cache_text(self.transformer, embeds, device),
            steps,
            generator,
            self._guidance,
            space_scale,
            time_scale,
            default(resampling_steps, "resampling_steps"),
            self._set_timestep,
        )
        denoise.check_cache(guide_continuation or all(known < 2 for _, _, known in windows))
        self._num_timesteps, self._interrupt = steps * len(windows), False
        with self.progress_bar(total=self._num_timesteps) as bar:
            tensors = {"prompt_embeds": embeds.prompt_embeds}
            on_step_end = StepEnd(self, bar, callback_on_step_end, names, tensors)
            for start, stop, known in windows:
                if self._interrupt:
                    break
                continued = done[:, :, start : start + known] if done is not None and known else None
                guided = known < 2 or guide_continuation
                sample = denoise if guided else denoise.unguided(len(noise))
                x = sample(noise[:, :, start:stop], continued, on_step_end)
                done = x if done is None else torch.cat([done, x[:, :, known:]], dim=2)
        assert done is not None  # there is at least one window

        # 5. Decode; the first frames are returned as they were passed, not as the VAE reproduces them.
        if output_type == "latent":
            frames: Any = done
        else:
            video = video_vae.decode(self.vae, done, decode_chunk_size, clip[0])
            if first_frames is not None:
                video[:, :, : first_frames.shape[-3]] = first_frames.to(video)
            frames = to_output(output_type, video)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames) if return_dict else (frames,)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> prompts.PromptEmbeds:
        """Encode prompts and what guidance moves away from; arguments are those of a call.

        The null caption, which stands in for a negative prompt where neither the call nor the checkpoint has one, has
        the mask of its prompt, as in training with caption dropout. Embeddings that are passed stay as they are.

        Returns:
            prompt_embeds [B, L, Dc], prompt_attention_mask [B, L], negative_prompt_embeds and
            negative_prompt_attention_mask, a row for each video; the last two are None without guidance, and
            negative_prompt_embeds alone is for the null caption, which a call takes if none are passed.

        Raises:
            SettingsError: an empty prompt, or neither prompt nor embeddings.
        """
        return prompts.encode_prompts(
            self.transformer,
            self.tokenizer,
            self.text_encoder,
            prompt,
            self.config.negative_prompt if negative_prompt is None else negative_prompt,
            num_videos_per_prompt,
            do_classifier_free_guidance,
            (prompt_embeds, prompt_attention_mask),
            (negative_prompt_embeds, negative_prompt_attention_mask),
            self._execution_device,
        )

    def prepare_latents(
        self,
        latents: Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        """Draw the starting noise, float32 [B, C, T, H, W], unless `latents` has it.

        Raises:
            SettingsError: `latents` of another shape.
        """
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise SettingsError(f"expected latents of shape {list(shape)}, not {list(latents.shape)}")
        return latents.to(device) * getattr(self.scheduler, "init_noise_sigma", 1.0)


# A saved pipeline records the module of its class: the public name must not change with the files.
STDiTPipeline.__module__ = "stdit_model"
# DiffusionPipeline.from_pretrained looks for the class of a saved pipeline in diffusers alone.
diffusers.STDiTPipeline = STDiTPipeline
