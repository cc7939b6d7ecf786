"""A loaded checkpoint, and how the videos of a request are made with it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit_cli.commands.sample import sidecar
from stdit_cli.commands.sample.request import Job, Request, Settings, parse_interval, parse_size
from stdit_data.video.read import read_picture, read_video
from stdit_model import video_vae
from stdit_model.sampling.schedulers import compat, sampler_name, use_sampler
from stdit_train.assets import resolve
from stdit_train.pipeline.load import (
    CheckpointSource,
    attach_text_encoder,
    find_checkpoint,
    free_text_encoder,
    load_pipeline,
)

Progress = Any  # a callback of STDiTPipeline.__call__


class VideoGenerator:
    """Attributes:
    settings: the request's, with every number that the checkpoint supplied.
    frames: of a finished video, given ones included.
    size: of a finished video, height and width. What is sampled may be larger by up to a patch, and is cut.
    """

    def __init__(self, request: Request) -> None:
        asked = request.settings
        self.found: CheckpointSource = find_checkpoint(resolve(asked.checkpoint))
        self.pipeline = load_pipeline(
            resolve(asked.checkpoint),
            vae=asked.vae,
            text_encoder=asked.text_encoder,
            text_8bit=asked.text_8bit,
            low_memory=asked.low_memory,
        )
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
        self.sampled = video_vae.covering_size(
            self.pipeline.vae, self.pipeline.transformer.config.patch_size, *self.size
        )
        self._read_given()
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        if asked.low_memory:
            self._encode_all(request)
        if request.recorded is not None and self.pipeline.device.type == "cpu":
            torch.set_num_threads(request.recorded["made_on"]["threads"])  # which shows in the last bits

    def _read_given(self) -> None:
        """`before`: the video to go on from, whole; `first`: the frames of it that the model sees; how long, how."""
        asked, trained = self.settings, self.pipeline.config.num_frames
        overlap = asked.overlap or max(trained // 2, 1)
        self.before: Tensor | None = None
        if asked.image is not None:
            self.before = read_picture(asked.image, *self.size)[:, None]
        elif asked.video is not None:
            self.before = read_video(asked.video, *self.size, fps=self.fps)[0]
        self.first = None if self.before is None else self.before[:, -min(overlap, self.before.shape[1]) :]
        unseen = 0 if self.before is None or self.first is None else self.before.shape[1] - self.first.shape[1]
        if asked.video is not None:
            assert self.before is not None
            self.frames = self.before.shape[1] + (asked.extend or trained)
        else:
            self.frames = asked.frames or trained
        self.new_frames = self.frames - unseen  # sampled, the first of them given
        longer = trained > 1 and self.new_frames > trained
        self.windowed = longer and asked.long == "windows"
        scale = self.pipeline.transformer.config.time_scale
        self.time_scale = scale * self.new_frames / trained if longer and asked.long == "stretch" else None

    def _encode_all(self, request: Request) -> None:
        """Every text, then away with the encoder: it is larger than all the rest."""
        source = resolve(self.settings.checkpoint)
        settings = self.settings
        attach_text_encoder(self.pipeline, source, text_encoder=settings.text_encoder, text_8bit=settings.text_8bit)
        texts = [text for wanted in request.wanted for text in (wanted.prompt, wanted.negative)]
        if request.recorded is not None:  # what was made together with it is made again, too
            texts += [video[name] for video in request.recorded["batch"]["videos"] for name in ("prompt", "negative")]
        for text in (*texts, request.negative):
            if text is not None:
                self._text(text)
        free_text_encoder(self.pipeline)

    def _text(self, text: str) -> tuple[Tensor, Tensor]:
        """The states of one text, encoded by itself and once, so that they don't depend on what else is asked for."""
        if text not in self._texts:
            y, mask, _, _ = self.pipeline.encode_prompt(text, do_classifier_free_guidance=False)
            self._texts[text] = y.cpu(), mask.cpu()
        return self._texts[text]

    def make(self, batch: list[Job], on_step: Progress) -> list[Tensor]:
        """The videos of a batch, each [3, T, H, W] in [-1, 1]. All have a negative prompt, or none has."""
        y, mask = (torch.cat(parts) for parts in zip(*(self._text(job.prompt) for job in batch), strict=True))
        options: dict[str, Any] = {"prompt_embeds": y, "prompt_attention_mask": mask}
        negatives = [self._text(job.negative) for job in batch if job.negative is not None]
        if negatives:
            y, mask = (torch.cat(parts) for parts in zip(*negatives, strict=True))
            options |= {"negative_prompt_embeds": y, "negative_prompt_attention_mask": mask}
        settings = self.settings
        height, width = self.sampled
        if settings.settling is not None:
            options["settling"] = settings.settling
        if self.windowed:
            options |= {"window": self.pipeline.config.num_frames, "overlap": settings.overlap}
        output: Any = self.pipeline(
            num_frames=self.new_frames,
            height=height,
            width=width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=parse_interval(settings.guidance_interval),
            guidance_channels=self.reference.get("guidance_channels"),
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            first_frames=None if self.first is None else _pad(self.first, self.sampled),
            time_scale=self.time_scale,
            decode_chunk_size=1 if settings.low_memory else 16,
            callback_on_step_end=on_step,
            **options,
        )
        videos = _cut(output.frames, self.size).cpu()
        if self.before is not None:
            seen = self.first.shape[1] if self.first is not None else 0
            videos = torch.cat([self.before.expand(len(batch), -1, -1, -1, -1), videos[:, :, seen:]], dim=2)
        return list(videos)

    def weights_sha256(self) -> str:
        """Of the transformer's files."""
        return sidecar.sha256(self.found.weights())

    def record(self) -> tuple[Settings, dict[str, Any]]:
        """What a sidecar says beside the prompt: settings that hold from any folder, and what followed from them."""

        def absolute(name: str | None) -> str | None:
            return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name

        places = ("checkpoint", "vae", "text_encoder", "image", "video")
        settings = self.settings
        moved = {name: absolute(value) for name in places if (value := getattr(settings, name)) not in (None, "demo")}
        scheduler = self.pipeline.scheduler
        used = {
            "frames": self.frames,
            "sampler": sampler_name(scheduler),
            "scheduler": {
                "class": type(scheduler).__name__,
                **{key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            },
            "sampled": f"{self.new_frames}x{self.sampled[0]}x{self.sampled[1]}",
            "guidance_channels": self.reference.get("guidance_channels"),
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
            **{f"{name}_sha256": sidecar.sha256([Path(file)]) for name in ("image", "video")
               if (file := moved.get(name)) and Path(file).is_file()},
        }  # fmt: skip
        return Settings(**{**asdict(settings), **moved}), used


def _pad(video: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, T, H, W] to a size that is not smaller, its borders repeated on all sides alike."""
    height, width = video.shape[-2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    borders = (left, size[1] - width - left, top, size[0] - height - top)
    return torch.nn.functional.pad(video, borders, mode="replicate") if any(borders) else video


def _cut(videos: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of [B, 3, T, H, W]: what `_pad` put around goes."""
    height, width = videos.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return videos[..., top : top + size[0], left : left + size[1]]
