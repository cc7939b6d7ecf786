"""Describe pictures with a model of images and text on this machine, through transformers: LLaVA, Qwen-VL and others.

B questions at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit_data.curation.captioners.prompts import Answer, Question
from stdit_data.curation.hub import loading
from stdit_data.errors import DataError
from stdit_data.workers.executors import worker_device
from stdit_data.workers.work import Unavailable

KIND = "captioner"
EXAMPLES = "LLaVA, LLaVA-OneVision, Qwen-VL or the like"
# Inputs of the families whose first axis counts images, the first that is there.
COUNTED = ("image_grid_thw", "image_sizes")


class LocalCaptioner:
    """A model of images and text and its processor.

    Args:
        model: folder or Hub id.
        temperature: of sampling; 0 takes the likeliest token.
        max_tokens: of an answer; a longer one is cut off.

    Raises:
        DataError: not a captioner.
    """

    def __init__(self, model: str, *, temperature: float, max_tokens: int) -> None:
        from transformers import AutoModelForImageTextToText

        self.name, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.processor = load_processor(model)
        self.device = worker_device()
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        with loading(model, KIND):
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).eval().to(self.device)
        self.settings = copy.deepcopy(self.model.generation_config)
        # Tokens are drawn by `_Draw`, each row's by its own seed.
        self.settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_tokens)
        self.settings.max_length = None
        if self.settings.pad_token_id is None:
            self.settings.pad_token_id = self.processor.tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer B questions in one batch.

        Raises:
            Unavailable: the GPU's memory is too small for so many.
        """
        try:
            inputs = make_inputs(self.processor, self.name, questions)
            draw = _Draw([question.seed for question in questions], self.temperature, self.device)
            tokens = self.model.generate(
                **inputs.to(self.device, dtype=self.model.dtype),
                generation_config=self.settings,
                logits_processor=[draw] if self.temperature > 0 else [],
            )
        except torch.OutOfMemoryError:
            raise Unavailable(
                f"{self.name}: out of GPU memory with `batch={len(questions)}`; give a smaller one, or smaller frames "
                "(`size=PIXELS`)"
            ) from None
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        stop = self.settings.eos_token_id
        stops = torch.tensor([stop] if isinstance(stop, int) else stop or [], device=tokens.device)
        finished = torch.isin(tokens, stops).any(1).tolist()
        return [Answer(text, done) for text, done in zip(texts, finished, strict=True)]


def make_inputs(processor: Any, name: str, questions: Sequence[Question]) -> Any:
    """Return the inputs of a model for B questions, and check that they hold every image.

    Args:
        processor: of the model.
        name: of the model, for messages.
        questions: B of them.

    Raises:
        DataError: the model's chat template or processor leaves images out.
    """
    chats = [_chat(question) for question in questions]
    prompts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    wanted = [len(question.images) for question in questions]
    marker = getattr(processor, "image_token", None) or "<image>"
    for prompt, count in zip(prompts, wanted, strict=True):
        if prompt.count(marker) != count:
            raise DataError(f"{name}: its chat template takes {prompt.count(marker)} of {count} images")
    start = processor.tokenizer.bos_token
    inputs = processor(
        images=[[Image.fromarray(image) for image in question.images] for question in questions],
        text=prompts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (start and prompts[0].startswith(start)),  # not a second time
    )
    counted = next((inputs[key] for key in COUNTED if key in inputs), None)
    if counted is None and inputs["pixel_values"].ndim == 4:  # [images, C, H, W]
        counted = inputs["pixel_values"]
    if counted is not None and len(counted) != sum(wanted):
        raise DataError(f"{name}: its processor takes {len(counted)} of {sum(wanted)} images")
    return inputs


def load_processor(model: str) -> Any:
    """Load the processor of a captioner, which needs no weights, and try it on three images.

    Raises:
        DataError: not a captioner, not there, or the packages of stdit-data[caption] are missing.
    """
    with loading(model, KIND):
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        from transformers.utils import logging as their_logging

        their_logging.set_verbosity_error()
        their_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        kind = AutoConfig.from_pretrained(model).model_type
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise DataError(f"{model}: a model of kind {kind!r} is no captioner; expected {EXAMPLES}")
        processor = AutoProcessor.from_pretrained(model)
        if getattr(processor, "chat_template", None) is None:
            raise DataError(f"{model}: a model of kind {kind!r} without a chat template; expected {EXAMPLES}")
    processor.tokenizer.padding_side = "left"  # answers of a batch begin at one place
    make_inputs(processor, model, [Question([np.zeros((64, 64, 3), np.uint8)] * 3, "Describe.", 0)])
    return processor


class _Draw:
    """Draws each row's next token by Gumbel noise of its own seed, whatever else is in the batch.

    The likeliest token after Gumbel noise is added to logits over a temperature is a sample of their softmax.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: str) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=own, device=own.device) for own in self.generators]
        ).clamp_min(torch.finfo(torch.float32).tiny)
        return scores.float() / self.temperature - torch.log(-torch.log(uniform))


def _chat(question: Question) -> list[dict[str, Any]]:
    images = [{"type": "image"} for _ in question.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.prompt}]}]
