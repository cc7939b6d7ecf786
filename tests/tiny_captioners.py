"""Tiny captioners with random weights: the model, processor and chat template of each family, as in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PIXELS, PATCH = 32, 16  # of a picture, and of a patch, as the models with fixed sizes see them
TOKENS = (PIXELS // PATCH) ** 2
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = ["describe", "a", "red", "circle", "square", "moves", "left", "right", "over", "white", "snow", "and", "stops"]
ROLES = ["USER:", "ASSISTANT:", "[INST]", "[/INST]", "user", "assistant"]
TURNS = ["<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

IMAGES_FIRST = (  # LLaVA's: all images, then all text
    "{{% for message in messages %}}{0}{{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}}"
    "{{{{ '<image>\n' }}}}{{% endfor %}}{{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}}"
    "{{{{ part['text'] + ' ' }}}}{{% endfor %}}{1}{{% endfor %}}{{% if add_generation_prompt %}}{2}{{% endif %}}"
)
LLAVA = IMAGES_FIRST.format("{{ message['role'].upper() + ': ' }}", "", "ASSISTANT:")
LLAVA_NEXT = IMAGES_FIRST.format("[INST] ", "[/INST]", "")
LLAVA_ONEVISION = IMAGES_FIRST.format(
    "{{ '<|im_start|>' + message['role'] + '\n' }}", "{{ '<|im_end|>\n' }}", "{{ '<|im_start|>assistant\n' }}"
)
QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(*special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS, *ROLES]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, additional_special_tokens=list(special))


def make_llava(folder: Path, chat_template: str = LLAVA) -> None:
    from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = make_tokenizer("<image>")
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=LlamaConfig(**SMALL, **ENDS, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)


def make_llava_next(folder: Path) -> None:
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    tokenizer = make_tokenizer("<image>")
    pinpoints = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS]]
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=MistralConfig(**SMALL, **ENDS, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": PIXELS},
            crop_size={"height": PIXELS, "width": PIXELS},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    ).save_pretrained(folder)


def make_llava_onevision(folder: Path) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer("<image>", "<video>", *TURNS)
    pinpoints = [[PIXELS, PIXELS], [PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS]]
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SMALL, image_size=PIXELS, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**SMALL, **ENDS, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    ).save_pretrained(folder)


def make_qwen2_vl(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1}
    make_qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision)


def make_qwen2_5_vl(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision["fullatt_block_indexes"] = [0]
    make_qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision)


def make_qwen(folder: Path, config: Any, model: Any, processor: Any, vision: dict[str, Any]) -> None:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = make_tokenizer(*TURNS, *VISION)
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SMALL, **ENDS, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope}
    model(
        config(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    ).save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=QWEN
    ).save_pretrained(folder)


def clip_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{**SMALL, "num_hidden_layers": 2}, image_size=PIXELS, patch_size=PATCH, projection_dim=16)


MAKERS: dict[str, Callable[..., None]] = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
}


def make(folder: Path, family: str, **options: Any) -> Path:
    """Write a captioner of a family, by the `model_type` of its configuration."""
    from transformers import set_seed

    set_seed(0)
    MAKERS[family](folder, **options)
    return folder
