"""Whether the device computes what the CPU does, and what bfloat16 and compilation change."""

import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from benchmarks.gpu.setup import Case, Setup, Values
from safetensors import safe_open
from torch import Tensor

from stdit_model import VARIANTS, STDiT

TITLE = "Numerics: largest difference, relative to the largest value"
GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
EXPECTED = {"bf16": 0.05, "fp32": 1e-5}  # largest differences to be expected
SIZES = {
    "depth": 4,
    "hidden_size": 288,
    "num_heads": 4,
    "caption_channels": 64,
    "model_max_length": 24,
}  # head width 72


def cases(setup: Setup) -> list[Case]:
    golden = sorted(file.stem for file in GOLDEN.glob("*.safetensors"))
    return [
        *(Case(f"{variant}, fp32 on the CPU and here", partial(across, setup, variant)) for variant in VARIANTS),
        Case("autocast to bf16 and fp32", partial(autocast, setup)),
        Case("bf16 weights and fp32", partial(half, setup)),
        Case("compiled and eager, fp32", partial(compiled, setup), rank=1, compiled=True),
        *(Case(f"golden file {name}", partial(reference, setup, name)) for name in golden),
    ]


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def judged(output: float, kind: str, **more: float | None) -> Values:
    largest = max([output, *(value for value in more.values() if value is not None)])
    return {"output": output, **more, "expected below": EXPECTED[kind], "as expected": largest < EXPECTED[kind]}


def make(variant: str = "seq", device: torch.device | None = None) -> STDiT:
    """A small model, all weights random, the same ones on any device."""
    generator = torch.Generator().manual_seed(0)
    model = STDiT(variant, **SIZES)
    for tensor in model.state_dict().values():
        tensor.copy_(0.06 * torch.randn(tensor.shape, generator=generator))
    return model.to(device)


def draw(device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    length = SIZES["model_max_length"]
    inputs = (
        torch.randn(2, 4, 6, 16, 16, generator=generator),
        torch.randint(0, 1000, (2,), generator=generator),
        torch.randn(2, length, SIZES["caption_channels"], generator=generator),
        torch.arange(length)[None] < torch.tensor([[length], [5]]),
    )
    return tuple(tensor.to(device) for tensor in inputs)


def gradient(model: STDiT, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the first attention's weights."""
    output = model(*inputs)
    output.float().square().mean().backward()
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith("qkv.weight"))
    assert weight.grad is not None
    return output, weight.grad


def across(setup: Setup, variant: str) -> Values:
    cpu = torch.device("cpu")
    expected = gradient(make(variant, cpu), draw(cpu))
    actual = gradient(make(variant, setup.device), draw(setup.device))
    return judged(relative(actual[0], expected[0]), "fp32", gradient=relative(actual[1], expected[1]))


def autocast(setup: Setup) -> Values:
    expected = gradient(make("seq", setup.device), draw(setup.device))
    with setup.autocast():
        actual = gradient(make("seq", setup.device), draw(setup.device))
    return judged(relative(actual[0], expected[0]), "bf16", gradient=relative(actual[1], expected[1]))


def half(setup: Setup) -> Values:
    x, t, y, mask = draw(setup.device)
    with torch.no_grad():
        expected = make("seq", setup.device)(x, t, y, mask)
        actual = make("seq", setup.device).bfloat16()(x.bfloat16(), t, y.bfloat16(), mask)
    return judged(relative(actual, expected), "bf16", gradient=None)


def compiled(setup: Setup) -> Values:
    model = make("seq", setup.device)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    expected, actual = gradient(make("seq", setup.device), draw(setup.device)), gradient(model, draw(setup.device))
    return judged(relative(actual[0], expected[0]), "fp32", gradient=relative(actual[1], expected[1]))


def reference(setup: Setup, name: str) -> Values:
    """What a reference release computed on random weights, computed here."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    pixart = name.startswith("pixart")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save({"state_dict": weights} if pixart else weights, path)
        load = STDiT.from_pixart if pixart else STDiT.from_open_sora
        model = load(path, num_heads=config["num_heads"]).to(setup.device)
    x, t, y, mask = (tensors[f"input.{key}"].to(setup.device) for key in ("x", "timestep", "y", "mask"))
    with torch.no_grad():
        output = model(x[:, :, None] if pixart else x, t, y, mask)
    expected = tensors["expected.output" if pixart else "expected.forward.output"]
    return judged(relative(output[:, :, 0] if pixart else output, expected), "fp32", gradient=None)
