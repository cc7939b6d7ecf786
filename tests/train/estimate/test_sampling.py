"""What sampling is said to hold, against what torch's allocator gave out."""

import json
from pathlib import Path

import torch

from stdit_model import STDiT
from stdit_train.estimate.sampling import describe_phases, peak, sampling_phases

MODEL = {
    "in_channels": 4, "hidden_size": 96, "depth": 2, "num_heads": 4, "caption_channels": 32, "model_max_length": 8,
}  # fmt: skip
TEXT = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 50}
VAE = {
    "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
}  # fmt: skip


def test_the_denoisers_peak_is_the_allocators(tmp_path: Path) -> None:
    phases = {p.name: p for p in sampling_phases(MODEL, (1, 4, 8, 16, 16), itemsize=4, text_encoder=TEXT, vae=VAE)}
    model = STDiT(**MODEL)
    states, mask = torch.randn(2, 8, 32), torch.ones(2, 8)
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        text = model.encode_text(states, mask)
        x = torch.randn(1, 4, 8, 16, 16)
        model(torch.cat([x, x]), torch.ones(2), text).float()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [
        e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"
    ]
    events.sort(key=lambda event: event["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    measured = max(event["args"]["Total Allocated"] for event in events) - before
    assert abs(phases["transformer"].working / measured - 1) < 0.15
    assert phases["transformer"].weights == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def test_a_peak_is_what_lives_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.ones(1000)
        b = a * 2  # two at once
        del a
        return b.view(10, 100) + 1  # a view costs nothing

    assert peak(run) == 2 * 4000


def test_phases_tell_what_fits() -> None:
    sizes = {"text_encoder": TEXT, "vae": VAE}
    one, many = (sampling_phases(MODEL, (1, 4, 8, 16, 16), decode_frames=n, **sizes) for n in (1, 8))
    assert 6 < many[2].working / one[2].working < 8.1
    eight = sampling_phases(MODEL, (1, 4, 8, 16, 16), text_8bit=True, **sizes)
    assert 2 * eight[0].weights == one[0].weights
    most = max(phase.total for phase in one)
    assert "which fits" in describe_phases(one, most)[0]
    assert "does not fit" in describe_phases(one, most - 1)[0]
