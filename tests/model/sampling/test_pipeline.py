"""STDiTPipeline with tiny real parts: reference samples, independence of the batch, guidance, round trips."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the pipeline is an extra of stdit-model")


from stdit_model import STDiT, STDiTPipeline, video_vae
from stdit_model.errors import SettingsError
from stdit_model.sampling.denoise import guide
from stdit_model.sampling.schedulers import compat, use_sampler

GOLDEN = Path(__file__).parents[2] / "golden"


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize(
    ("name", "sample"), [("opensora_v1_stdit_16x256", "iddpm10_cfg7"), ("opensora_v1_stdit_edges", "iddpm7_cfg7")]
)
def test_the_reference_samples(
    name: str, sample: str, tiny_vae: Callable[[int], AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ancestral iDDPM steps with the reference's noise give the reference's samples, guidance on 3 channels."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    sizes = {key: config[key] for key in ("depth", "hidden_size", "num_heads", "caption_channels", "model_max_length")}
    model = STDiT(**sizes, space_scale=config["space_scale"], time_scale=config["time_scale"]).eval()
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("pos_embed")})

    class Recorded(nn.Module):
        """In the text encoder's place: the recorded states."""

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=golden["input.y"].squeeze(1))

    class RecordedMask:
        """In the tokenizer's place: the recorded mask."""

        def __call__(self, _captions: list[str], **_: Any) -> Any:
            tokens = SimpleNamespace(input_ids=golden["input.mask"], attention_mask=golden["input.mask"])
            tokens.to = lambda _device: tokens
            return tokens

    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type="learned_range", timestep_spacing="linspace", clip_sample=False
    )
    pipe = STDiTPipeline(model, tiny_vae(1), None, None, scheduler)
    pipe.text_encoder, pipe.tokenizer = Recorded(), RecordedMask()
    pipe.set_progress_bar_config(disable=True)
    noises = iter(golden[f"input.sample.{sample.split('_')[0]}_noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))
    z = golden["input.sample.z"]
    settings = compat("open-sora-1.0")  # as `stdit sample --compat open-sora-1.0` does
    assert settings.pop("num_inference_steps") == 100
    use_sampler(pipe, settings.pop("sampler"))
    output = pipe(
        ["a prompt"] * len(z),
        num_frames=z.shape[2],
        height=z.shape[3],
        width=z.shape[4],
        latents=z,
        num_inference_steps=config["sampling"]["iddpm_steps"],
        output_type="latent",
        **settings,
    ).frames
    expected = golden[f"expected.sample.{sample}"]
    assert ((output - expected).abs().max() / expected.abs().max()).item() < 5e-6


def test_a_video_does_not_depend_on_what_else_is_asked_for(pipeline: STDiTPipeline) -> None:
    together = pipeline(["one", "another"], generator=seeds(5, 6)).frames
    alone = pipeline("another", generator=seeds(6)).frames
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1 / 255)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_prompts_and_guidance_matter(pipeline: STDiTPipeline) -> None:
    one, other = (pipeline(prompt, generator=seeds(0)).frames for prompt in ("a cat", "a house by the sea"))
    assert not torch.equal(one, other)
    assert not torch.equal(one, pipeline("a cat", generator=seeds(0), guidance_scale=1.0).frames)
    assert not torch.equal(one, pipeline("a cat", "a dog", generator=seeds(0)).frames)


def test_guidance_is_linear() -> None:
    output = torch.randn(4, 6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    unconditional, conditional = output.chunk(2)
    assert torch.equal(guide(output, 1.0, 3)[:, 3:], conditional[:, 3:])
    torch.testing.assert_close(guide(output, 1.0, 6), conditional)
    torch.testing.assert_close(guide(output, 0.0, 6), unconditional)
    torch.testing.assert_close(guide(output, 3.0, 6), unconditional + 3 * (conditional - unconditional))


def test_rescaled_guidance_keeps_the_spread_of_the_prompts_half() -> None:
    output = torch.randn(4, 6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    conditional = output.chunk(2)[1][:, :4]
    axes = (1, 2, 3, 4)
    torch.testing.assert_close(guide(output, 7.0, 4, rescale=1.0)[:, :4].std(axes), conditional.std(axes))
    assert (guide(output, 7.0, 4)[:, :4].std(axes) > 2 * conditional.std(axes)).all()


def test_guidance_in_an_interval(pipeline: STDiTPipeline) -> None:
    """A step that is not guided is that of the prompt alone, and costs half."""
    sizes = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    partly = pipeline("a cat", generator=seeds(0), guidance_start=0.3, guidance_stop=0.6).frames
    handle.remove()
    assert sizes == [1, 2, 1]
    assert not torch.equal(partly, pipeline("a cat", generator=seeds(0)).frames)
    with pytest.raises(ValueError, match=r"guidance_start 0\.7, guidance_stop 0\.3"):
        pipeline("a cat", guidance_start=0.7, guidance_stop=0.3)


def test_embeddings_stand_in_for_text_and_its_encoder(pipeline: STDiTPipeline) -> None:
    y, mask, null, null_mask = pipeline.encode_prompt("a cat", "a dog")
    expected = pipeline("a cat", "a dog", generator=seeds(0)).frames
    without = {**pipeline.components, "text_encoder": None, "tokenizer": None}
    bare = STDiTPipeline(**without, num_frames=4, height=32, width=32, num_inference_steps=3, guidance_scale=3.0)
    bare.set_progress_bar_config(disable=True)
    found = bare(
        prompt_embeds=y, prompt_attention_mask=mask, negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask, generator=seeds(0),
    ).frames  # fmt: skip
    with pytest.raises(ValueError, match="prompt_embeds"):
        bare("a cat")
    assert torch.equal(found, expected)


def test_slicing_tiling_and_chunks(pipeline: STDiTPipeline) -> None:
    whole = pipeline("a cat", generator=seeds(0)).frames
    torch.testing.assert_close(pipeline("a cat", generator=seeds(0), decode_chunk_size=1).frames, whole)
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(pipeline("a cat", generator=seeds(0)).frames, whole)
    pipeline.vae.disable_slicing()
    pipeline.vae.enable_tiling()
    assert pipeline("a cat", generator=seeds(0)).frames.shape == whole.shape
    pipeline.vae.disable_tiling()


def test_given_frames_stay_as_they_are(pipeline: STDiTPipeline) -> None:
    first = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video = pipeline(["a cat", "a dog"], first_frames=first, generator=seeds(0, 1)).frames
    assert torch.equal(video[:, :, :2], first.expand(2, -1, -1, -1, -1))
    assert not torch.equal(video[0, :, 2:], video[1, :, 2:])
    long = pipeline("a cat", first_frames=first, num_frames=10, window=4, overlap=2, generator=seeds(0)).frames
    assert long.shape == (1, 3, 10, 32, 32)
    assert torch.equal(long[0, :, :2], first)
    with pytest.raises(ValueError, match=r"expected first_frames of shape \[3, K, 32, 32\]"):
        pipeline("a cat", first_frames=first[..., :16])
    with pytest.raises(ValueError, match="nothing is left to sample"):
        pipeline("a cat", first_frames=first, num_frames=2)


def test_a_callback_counts_through_all_windows_and_may_stop(pipeline: STDiTPipeline) -> None:
    seen = []

    def stop(pipe: Any, i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, pipe.num_timesteps, pipe.guidance_scale))
        pipe._interrupt = i == 7
        return values

    pipeline("a cat", num_frames=10, window=4, callback_on_step_end=stop, output_type="latent")
    assert seen[:8] == [(i, 12, 3.0) for i in range(8)]
    assert pipeline.num_timesteps == 12


def test_output_types(pipeline: STDiTPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 1}
    video = pipeline("x", generator=seeds(0), **arguments).frames
    assert video.shape == (1, 3, 4, 32, 32)
    assert video.abs().max() <= 1
    array = pipeline("x", generator=seeds(0), output_type="np", **arguments).frames
    assert array.shape == (1, 4, 32, 32, 3)
    assert abs(array - (video / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()).max() < 1e-6
    (images,) = pipeline("x", generator=seeds(0), output_type="pil", **arguments).frames
    assert [image.size for image in images] == [(32, 32)] * 4
    assert pipeline("x", output_type="latent", **arguments).frames.shape == (1, 4, 4, 4, 4)
    with pytest.raises(ValueError, match="output_type"):
        pipeline("x", output_type="gif")


def test_sizes_that_do_not_fit_are_named(pipeline: STDiTPipeline) -> None:
    with pytest.raises(ValueError, match="height 30 is not a multiple of 8: take 24 or 32"):
        pipeline("x", height=30)
    with pytest.raises(ValueError, match="empty"):
        pipeline(" ")


def test_callbacks_see_and_replace_latents(pipeline: STDiTPipeline) -> None:
    seen = []

    def look(_pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, float(t), values["latents"].shape))
        return {"latents": torch.zeros_like(values["latents"])}

    frames = pipeline("x", output_type="latent", callback_on_step_end=look).frames
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert frames.abs().max() == 0


def test_round_trip(pipeline: STDiTPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["transformer"] == ["stdit_model", "STDiT"]
    again = STDiTPipeline.from_pretrained(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    assert (again.config.num_frames, again.config.guidance_scale) == (4, 3.0)
    one, other = (p("a cat", generator=seeds(1)).frames for p in (pipeline, again))
    assert torch.equal(one, other)


def test_settling_is_the_old_name_of_resampling_steps(pipeline: STDiTPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index.pop("resampling_steps") == 3
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index | {"settling": 1}))
    old = STDiTPipeline.from_pretrained(tmp_path / "p")
    assert old.config.resampling_steps == 1
    assert "settling" not in old.config
    old.set_progress_bar_config(disable=True)
    first = torch.zeros(3, 1, 32, 32)
    with pytest.warns(FutureWarning, match="settling is now resampling_steps"):
        renamed = old("a cat", first_frames=first, settling=2, generator=seeds(0)).frames
    assert torch.equal(renamed, old("a cat", first_frames=first, resampling_steps=2, generator=seeds(0)).frames)
    assert not torch.equal(renamed, old("a cat", first_frames=first, generator=seeds(0)).frames)


def test_a_missing_part_is_named(pipeline: STDiTPipeline, tmp_path: Path) -> None:
    import shutil

    pipeline.save_pretrained(tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "vae")
    with pytest.raises(FileNotFoundError, match="lacks vae"):
        STDiTPipeline.from_pretrained(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        STDiTPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_vae_chunks_change_nothing(pipeline: STDiTPipeline, chunk: int) -> None:
    video = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = video_vae.encode_moments(pipeline.vae, video, chunk=100)
    torch.testing.assert_close(video_vae.encode_moments(pipeline.vae, video, chunk=chunk), whole, rtol=1e-5, atol=1e-5)
    latents = video_vae.sample_latents(pipeline.vae, whole)
    torch.testing.assert_close(
        video_vae.decode(pipeline.vae, latents, chunk=chunk), video_vae.decode(pipeline.vae, latents), rtol=0, atol=1e-5
    )


def test_latents_are_those_of_diffusers(pipeline: STDiTPipeline) -> None:
    """mean * 0.18215, as Stable Diffusion's VAE has it, frame by frame."""
    video = torch.rand(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = video_vae.sample_latents(pipeline.vae, video_vae.encode_moments(pipeline.vae, video))
    with torch.no_grad():
        frame = pipeline.vae.encode(video[:, :, 1]).latent_dist.mean * 0.18215
    torch.testing.assert_close(latents[:, :, 1], frame)


def test_parts_named_by_hub_id(pipeline: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that names its VAE, text encoder and tokenizer finds them; offline it says which one is missing."""
    from stdit_model.sampling.folder import write_pipeline

    pipeline.transformer.save_pretrained(tmp_path / "model")
    write_pipeline(tmp_path / "model", tmp_path / "p", vae="owner/vae", text_encoder="owner/t5", tokenizer="owner/t5")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"owner/\w+: not found .*hf download owner/"):
        STDiTPipeline.from_pretrained(tmp_path / "p")
    parts = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
    again = STDiTPipeline.from_pretrained(tmp_path / "p", **parts)
    again.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2}
    assert again("a cat", generator=seeds(0), **arguments).frames.shape == (1, 3, 4, 32, 32)


def test_the_first_frame_may_be_a_pil_image(pipeline: STDiTPipeline) -> None:
    (images,) = pipeline("x", generator=seeds(0), output_type="pil").frames
    assert all(isinstance(image, Image.Image) for image in images)
    [continued] = pipeline("x", generator=seeds(1), first_frames=images[-1], output_type="pil").frames
    assert continued[0].tobytes() == images[-1].tobytes()
    assert continued[1].tobytes() != images[-1].tobytes()
    larger = Image.new("RGBA", (100, 64), (255, 0, 0, 0))  # covers 32x32, and nothing of it is opaque
    [video] = pipeline("x", generator=seeds(1), first_frames=[images[0], larger], output_type="np").frames
    assert (video[1] == 1).all()
    with pytest.raises(SettingsError, match="a PIL image or a list"):
        pipeline("x", first_frames=["first.png"])
    [single] = pipeline("x", generator=seeds(1), num_frames=1, output_type="pil").frames
    assert [image.size for image in single] == [(32, 32)]


def test_first_frames_need_known_noise_levels(pipeline: STDiTPipeline) -> None:
    components = {**pipeline.components, "scheduler": EulerDiscreteScheduler()}
    other = STDiTPipeline(**components, num_frames=4, height=32, width=32, num_inference_steps=1)
    for options in ({"first_frames": torch.zeros(3, 1, 32, 32)}, {"num_frames": 8, "window": 4}):
        with pytest.raises(SettingsError, match=r"EulerDiscreteScheduler.*cannot continue"):
            other("x", **options)


def test_an_interrupted_step_counts(pipeline: STDiTPipeline) -> None:
    def stop(pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    noise = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    made = pipeline("x", latents=noise, callback_on_step_end=stop, output_type="latent").frames
    assert not torch.equal(made, noise)


def test_decoding_makes_one_video_at_a_time(pipeline: STDiTPipeline) -> None:
    """The frames are decoded into one buffer: besides it, only a chunk's frames and layers."""
    latents = torch.zeros(1, 4, 160, 4, 4)
    size = 160 * 3 * 32 * 32 * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        video_vae.decode(pipeline.vae, latents, chunk=1)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert size <= most < 1.5 * size
