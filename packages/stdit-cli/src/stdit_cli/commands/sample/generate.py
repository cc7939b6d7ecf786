"""Make the videos of a request with a loaded checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.request import Job, SampleRequest, Settings, parse_adapter, parse_interval, parse_size
from stdit_data.video.read import read_picture, read_video
from stdit_model import STDiTPipeline, video_vae
from stdit_model.sampling.caches import cache_config
from stdit_model.sampling.schedulers import compat, sampler_name, use_sampler
from stdit_model.text import dropped_text, encode_captions, unknown_words
from stdit_model.weights.find_lora import find_lora
from stdit_train.errors import ConfigError
from stdit_train.evaluation.video_metrics import psnr
from stdit_train.pipeline.find import CheckpointSource
from stdit_train.pipeline.load import attach_text_encoder, free_text_encoder, load_pipeline

MAX_WORDS = 10  # that a warning lists
MAX_VOCABULARY = 100  # a tokenizer with fewer words has them listed
FAR_GUIDANCE = 2.0  # times the checkpoint's own from which on it is warned of
# dB after the VAE. Measured with that of the demo: `shapes` at 29 to 44, also as mp4 (80 clips, mean 38); three real
# clips at 12 to 18 at 64x64 and up to 20 at 256x256.
POOR_PSNR = 24.0


def load(settings: Settings, source: CheckpointSource) -> STDiTPipeline:
    """Load a checkpoint as the settings say: with which components and adapters, and how it is to be computed.

    Raises:
        ConfigError, WeightsError: a checkpoint, component or adapter that cannot be loaded.
    """
    pipeline = load_pipeline(
        source,
        vae=settings.vae,
        text_encoder=settings.text_encoder,
        text_8bit=settings.text_8bit,
        low_memory=settings.low_memory,
        offload=settings.offload,
        loras=[parse_adapter(adapter) for adapter in settings.lora or ()],
    )
    if settings.cache is not None:
        pipeline.transformer.enable_cache(cache_config(settings.cache, lambda: pipeline.current_timestep))
    if settings.compile:
        pipeline.transformer.compile_repeated_blocks()
    return pipeline


class VideoGenerator:
    """A loaded pipeline with the settings of a request.

    Args:
        request: its texts are encoded at once with `low_memory`.
        source: its checkpoint.
        pipeline: the checkpoint as `load` returns it; one without a sampler set serves several requests.

    Attributes:
        source: the checkpoint.
        pipeline: with the request's sampler.
        settings: the request's, with every number that the checkpoint supplied.
        frames: of a finished video, given ones included.
        size: height and width of a finished video. What is sampled may be larger by up to a patch, and is cropped.
        fps: frames a second when played.
        windowed: whether a video is longer than trained on, and made window by window.
        new_frames: frames to sample, with the conditioning frames at their head.

    Raises:
        ConfigError, WeightsError, DataError: a text encoder, picture or video that cannot be loaded.
    """

    def __init__(self, request: SampleRequest, source: CheckpointSource, pipeline: STDiTPipeline) -> None:
        asked = request.settings
        self.source, self.pipeline = source, pipeline
        self.reference = compat(asked.compat) if asked.compat is not None else {}
        sampler = asked.sampler or self.reference.get("sampler")
        if sampler is not None:
            use_sampler(self.pipeline, sampler)
        config = self.pipeline.config
        height, width = parse_size(asked.size)
        self.size = height or config.height, width or config.width
        self.fps = asked.fps or config.fps
        self.settings = replace(
            asked,
            frames=None if asked.video else asked.frames or config.num_frames,
            size=f"{self.size[0]}x{self.size[1]}",
            fps=self.fps,
            steps=asked.steps or self.reference.get("num_inference_steps", config.num_inference_steps),
            guidance=self.reference.get("guidance_scale", config.guidance_scale)
            if asked.guidance is None
            else asked.guidance,
        )
        patch_size = self.pipeline.transformer.config.patch_size
        self.sampled_size = video_vae.covering_size(self.pipeline.vae, patch_size, *self.size)
        self._read_conditioning()
        self._states: dict[str, tuple[Tensor, Tensor]] = {}
        if asked.low_memory:
            self._encode_all(request)
        if request.recorded is not None and self.pipeline._execution_device.type == "cpu":
            torch.set_num_threads(request.recorded["made_on"]["threads"])  # sums in the same order

    def _read_conditioning(self) -> None:
        """Read the picture or video to start from, and derive the lengths and the way to make a long video."""
        asked, trained = self.settings, self.pipeline.config.num_frames
        overlap = asked.overlap or max(trained // 2, 1)
        self.before: Tensor | None = None  # all given frames
        if asked.image is not None:
            self.before = read_picture(asked.image, *self.size)[:, None]
        elif asked.video is not None:
            self.before = read_video(asked.video, *self.size, fps=self.fps)[0]
        if self.before is None:
            self.first_frames, skipped = None, 0
        else:
            self.first_frames = self.before[:, -min(overlap, self.before.shape[1]) :]  # those that the model sees
            skipped = self.before.shape[1] - self.first_frames.shape[1]
        if asked.video is not None and self.before is not None:
            self.frames = self.before.shape[1] + (asked.extend or trained)
        else:
            self.frames = asked.frames or trained
        self.new_frames = self.frames - skipped
        longer = trained > 1 and self.new_frames > trained
        self.windowed = longer and asked.long == "windows"
        scale = self.pipeline.transformer.config.time_scale
        self.time_scale = scale * self.new_frames / trained if longer and asked.long == "stretch" else None

    def _encode_all(self, request: SampleRequest) -> None:
        """Encode every text of a request, then free the text encoder, which is larger than everything else."""
        settings = self.settings
        attach_text_encoder(
            self.pipeline, self.source, text_encoder=settings.text_encoder, text_8bit=settings.text_8bit
        )
        texts = [text for asked in request.prompts for text in (asked.prompt, asked.negative)]
        if request.recorded is not None:  # the videos of its batch are made again with it
            texts += [video[key] for video in request.recorded["batch"]["videos"] for key in ("prompt", "negative")]
        for text in (*texts, request.negative, self.pipeline.config.negative_prompt):
            if text is not None:
                self._encode(text)
        free_text_encoder(self.pipeline)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Return states [1, L, Dc] and mask [1, L] of a text, encoded once and independently of the other texts."""
        if text not in self._states:
            length = self.pipeline.transformer.config.model_max_length
            parts = self.pipeline.tokenizer, self.pipeline.text_encoder
            device = None if self.settings.low_memory else self.pipeline._execution_device
            y, mask = encode_captions(*parts, [text], length, device)
            self._states[text] = y.cpu(), mask.cpu()
        return self._states[text]

    def make(self, batch: list[Job], on_step: Callable[..., dict[str, Any]]) -> list[Tensor]:
        """Make the videos of a batch.

        Args:
            batch: all with a negative prompt, or all without.
            on_step: called after each denoising step, see `callback_on_step_end` of diffusers.

        Returns:
            A video [3, T, H, W] in [-1, 1] for each job.

        Raises:
            ConfigError: there is not enough memory for it.
        """
        y, mask = (torch.cat(parts) for parts in zip(*(self._encode(job.prompt) for job in batch), strict=True))
        options: dict[str, Any] = {"prompt_embeds": y, "prompt_attention_mask": mask}
        default = self.pipeline.config.negative_prompt
        texts = [default if job.negative is None else job.negative for job in batch]
        negatives = [self._encode(text) for text in texts if text is not None]
        if negatives:
            y, mask = (torch.cat(parts) for parts in zip(*negatives, strict=True))
            options |= {"negative_prompt_embeds": y, "negative_prompt_attention_mask": mask}
        settings = self.settings
        height, width = self.sampled_size
        if settings.resampling_steps is not None:
            options["resampling_steps"] = settings.resampling_steps
        if self.windowed:
            options |= {"window": self.pipeline.config.num_frames, "overlap": settings.overlap}
        guidance_start, guidance_stop = parse_interval(settings.guidance_interval)
        try:
            output: Any = self.pipeline(
                num_frames=self.new_frames,
                height=height,
                width=width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                guidance_rescale=settings.guidance_rescale,
                guidance_start=guidance_start,
                guidance_stop=guidance_stop,
                guidance_channels=self.reference.get("guidance_channels"),
                generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                first_frames=None if self.first_frames is None else _pad(self.first_frames, self.sampled_size),
                time_scale=self.time_scale,
                decode_chunk_size=1 if settings.low_memory else 16,
                callback_on_step_end=on_step,
                **options,
            )
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise ConfigError(
                f"not enough memory for {len(batch)} x {self.new_frames}x{height}x{width} (frames x height x width): "
                "take a smaller --size, --frames or --batch, or --low-memory"
            ) from error
        videos = _crop(output.frames, self.size).cpu()
        if self.before is not None and self.first_frames is not None:
            new = videos[:, :, self.first_frames.shape[1] :]
            videos = torch.cat([self.before.expand(len(batch), -1, -1, -1, -1), new], dim=2)
        return list(videos)

    def weights_sha256(self) -> str:
        """Return the SHA-256 of the transformer's files."""
        return sidecar.sha256(self.source.weights())

    def record(self) -> tuple[Settings, dict[str, Any]]:
        """Return what a sidecar records: the settings, with absolute paths, and what followed from them."""

        def absolute(name: str) -> str:
            path = Path(name).expanduser()
            return str(path.resolve()) if path.exists() else name

        settings, scheduler = self.settings, self.pipeline.scheduler
        keys = ("checkpoint", "vae", "text_encoder", "image", "video")
        paths = {key: absolute(value) for key in keys if (value := getattr(settings, key)) not in (None, "demo")}
        loras = [(name, scale, find_lora(name)) for name, scale in map(parse_adapter, settings.lora or ())]
        files = {key: Path(paths[key]) for key in ("image", "video") if key in paths and Path(paths[key]).is_file()}
        used = {
            "frames": self.frames,
            "sampler": sampler_name(scheduler),
            "scheduler": {
                "class": type(scheduler).__name__,
                **{key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            },
            "sampled": f"{self.new_frames}x{self.sampled_size[0]}x{self.sampled_size[1]}",
            "guidance_channels": self.reference.get("guidance_channels"),
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
            **{f"{key}_sha256": sidecar.sha256([file]) for key, file in files.items()},
        }
        if loras:
            used["lora_sha256"] = [sidecar.sha256([file]) for _, _, file in loras]
        adapters = [f"{absolute(name)}:{scale:g}" for name, scale, _ in loras] or None
        return Settings(**{**asdict(settings), **paths, "lora": adapters}), used


def remarks(generator: VideoGenerator, jobs: list[Job]) -> Iterator[str]:
    """Yield a warning if the request goes beyond what the checkpoint was trained on, and a line on long videos."""
    pipeline = generator.pipeline
    config, tokenizer = pipeline.config, pipeline.tokenizer
    findings = []
    trained = (config.num_frames, config.height, config.width)
    asked = (config.num_frames if generator.windowed else generator.new_frames, *generator.size)
    if asked != trained and not (config.single_frames and asked == (1, *trained[1:])):
        findings.append(f"{_by(asked)} (frames x height x width; trained on {_by(trained)})")
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    guidance = generator.settings.guidance
    if guidance is not None and guidance > FAR_GUIDANCE * max(1.0, config.guidance_scale):
        findings.append(
            f"guidance {guidance:g} (its own is {config.guidance_scale:g}; far above it videos become noise)"
        )
    if generator.first_frames is not None and (ratio := _psnr_of_given_frames(generator)) < POOR_PSNR:
        findings.append(
            f"given frames that its VAE turns into blobs (PSNR {ratio:.0f} dB; the demo's VAE knows flat shapes alone: "
            "take a checkpoint that was trained with a VAE for such footage, e.g. stabilityai/sd-vae-ft-ema)"
        )
    unknown = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(tokenizer, prompt)))
    if unknown:
        words = ", ".join(repr(word) for word in unknown[:MAX_WORDS]) + (", ..." if len(unknown) > MAX_WORDS else "")
        known = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
        listing = f" (known words: {', '.join(known)})" if len(known) < MAX_VOCABULARY else ""
        findings.append(f"unknown words {words}{listing}")
    length = pipeline.transformer.config.model_max_length
    cut = [rest for prompt in prompts if (rest := dropped_text(tokenizer, prompt, length))]
    if cut:
        others = f", and the ends of {len(cut) - 1} more prompts" if len(cut) > 1 else ""
        findings.append(f"prompts are cut after {length} tokens, which drops {cut[0]!r}{others}")
    if findings:
        yield f"warning: beyond what this checkpoint was trained on: {'; '.join(findings)}"
    if generator.windowed:
        window = config.num_frames
        yield f"{generator.frames} frames, in windows of {window}; --long stretch or whole makes them at once"


def _psnr_of_given_frames(generator: VideoGenerator) -> float:
    """Return the PSNR of the given frames after the VAE, of the last one where each is encoded alone."""
    vae, given = generator.pipeline.vae, generator.first_frames
    assert given is not None
    if not video_vae.is_temporal(vae):
        given = given[:, -1:]
    frames = _pad(given, generator.sampled_size)[None].to(generator.pipeline._execution_device)
    latents = video_vae.sample_latents(vae, video_vae.encode_moments(vae, frames))
    again = video_vae.decode(vae, latents, frames=frames.shape[2])
    return psnr(again, frames)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _pad(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad [3, T, H, W] to a larger size, borders repeated equally on all sides."""
    height, width = video.shape[-2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    borders = (left, size[1] - width - left, top, size[0] - height - top)
    return torch.nn.functional.pad(video, borders, mode="replicate") if any(borders) else video


def _crop(videos: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop [B, 3, T, H, W] to its middle, undoing `_pad`."""
    height, width = videos.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return videos[..., top : top + size[0], left : left + size[1]]
