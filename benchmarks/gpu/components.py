"""The VAE and the text encoder in the loop, beside a training step with cached latents and texts."""

from functools import partial

import torch
from benchmarks.gpu.sampling import make_vae
from benchmarks.gpu.setup import Case, Setup, Values
from benchmarks.gpu.training import case_name

from stdit_model import video_vae

TITLE = "VAE and text encoder in the loop, beside the step with cached latents"
T5 = {  # T5-XXL's encoder
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
TINY_T5 = {**T5, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 64}


def cases(setup: Setup) -> list[Case]:
    found = [
        Case(f"VAE, {size}, {name}", partial(encode_video, setup, size, dtype), rank=1)
        for size in ("16x256", "16x512")
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    return [*found, Case("T5-XXL, 120 tokens, bf16", partial(encode_text, setup), rank=1)]


def beside_step(setup: Setup, size: str, seconds: float) -> Values:
    """Return the seconds of a sample, and how many times as long a training step takes with them."""
    step = setup.results.get(("training", case_name(size, False, "none")), {}).get("samples/s")
    longer = None if step is None else 1.0 + seconds * step
    return {"s/sample": seconds, "step in the loop / cached": longer, "of a step at": size}


def encode_video(setup: Setup, size: str, dtype: torch.dtype) -> Values:
    vae, batch = make_vae(setup, dtype), 1 if setup.tiny else 4
    frames, height, width = setup.latents[size]
    video = torch.rand(batch, 3, frames, 8 * height, 8 * width, device=setup.device) * 2 - 1
    setup.forget_peak()
    seconds = setup.timed(lambda: video_vae.encode_moments(vae, video)) / batch
    return {**beside_step(setup, size, seconds), "peak GiB": setup.peak_gib()}


def encode_text(setup: Setup) -> Values:
    from transformers import T5Config, T5EncoderModel
    from transformers.initialization import no_init_weights

    batch, length = (2, 12) if setup.tiny else (16, 120)
    with setup.device, no_init_weights():
        encoder = T5EncoderModel(T5Config(**(TINY_T5 if setup.tiny else T5))).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.02)
    tokens = torch.randint(1, 60, (batch, length), device=setup.device)

    def encode() -> None:
        with torch.no_grad():
            encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))

    setup.forget_peak()
    seconds = setup.timed(encode) / batch
    return {**beside_step(setup, "16x256", seconds), "peak GiB": setup.peak_gib()}
