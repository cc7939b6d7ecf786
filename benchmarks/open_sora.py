"""Open-Sora v1.0's own STDiT, read from a clone of hpcaitech/Open-Sora; nothing of it is copied here.

Its model needs flash-attn, xformers, timm and mmengine. Stand-ins take their places: torch's scaled dot-product
attention those of the first two, which have no CPU kernels, and a few lines those of the others.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

TAG = "v1.0.0"
ABSENT = {  # modules with names that the model imports and does not use here
    "opensora.acceleration.communications": (
        "all_to_all",
        "gather_forward_split_backward",
        "split_forward_gather_backward",
    ),
    "opensora.acceleration.parallel_states": ("get_sequence_parallel_group",),
    "opensora.utils.ckpt_utils": ("load_checkpoint",),
    "timm.models.layers": ("DropPath",),
}
FROM_CLONE = ("opensora.acceleration.checkpoint", "opensora.models.layers.blocks", "opensora.models.stdit.stdit")


class Mlp(nn.Module):
    """That of timm."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Registry:
    """That of mmengine, which registers nothing here."""

    def register_module(self, *_: Any) -> Callable[[Any], Any]:
        return lambda found: found


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attention of [B, L, N, K], as flash-attn has it, on any device."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def from_seqlens(queries: list[int], keys: list[int]) -> int:
    """Return the number of clips of a batch, of equal lengths."""
    assert len(set(queries)) == len(set(keys)) == 1
    return len(queries)


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, p: float, attn_bias: int) -> Tensor:
    """Attention of [1, B * L, N, K] within each clip, as xformers has it."""
    q, k, v = (x.reshape(attn_bias, -1, *x.shape[2:]) for x in (q, k, v))
    return flash_attn_func(q, k, v).contiguous().view(1, -1, *q.shape[2:])


@contextmanager
def stand_ins() -> Iterator[None]:
    """Put the stand-ins in the places of the modules."""
    made = {name: ModuleType(name) for name in ABSENT}
    for name, module in made.items():
        for attribute in ABSENT[name]:
            setattr(module, attribute, None)
    contents: dict[str, dict[str, Any]] = {
        "opensora.registry": {"MODELS": Registry()},
        "timm.models.vision_transformer": {"Mlp": Mlp},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention, "fmha": ModuleType("fmha")},
    }
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(attributes)
    made["xformers"].ops = made["xformers.ops"]  # type: ignore[attr-defined]
    made["xformers.ops"].fmha.BlockDiagonalMask = type("Mask", (), {"from_seqlens": staticmethod(from_seqlens)})
    for name in list(made):  # packages around them
        parts = name.split(".")
        for count in range(1, len(parts)):
            made.setdefault(".".join(parts[:count]), ModuleType(parts[0]))
    with patch.dict(sys.modules, made):
        yield


def load(clone: Path) -> type[nn.Module]:
    """Return the class STDiT of the version that is tagged v1.0.0.

    Args:
        clone: of https://github.com/hpcaitech/Open-Sora, with its tags.
    """
    attention = sys.modules.setdefault("flash_attn", ModuleType("flash_attn"))  # imported in each forward
    attention.__spec__ = attention.__spec__ or ModuleSpec("flash_attn", None)  # libraries ask for it
    attention.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    with stand_ins():
        for name in FROM_CLONE:
            file = f"{name.replace('.', '/')}.py"
            show = ["git", "-C", str(clone), "show", f"{TAG}:{file}"]
            source = subprocess.run(show, check=True, capture_output=True, text=True).stdout
            module = sys.modules[name] = ModuleType(name)
            exec(compile(source, file, "exec"), module.__dict__)
        return module.STDiT


def build(stdit: type[nn.Module], width: int, heads: int, depth: int, frames: int, size: int) -> nn.Module:
    """Build it for clips of a number of latent frames, and a latent height and width."""
    sizes = {"hidden_size": width, "num_heads": heads, "depth": depth, "input_size": (frames, size, size)}
    return stdit(**sizes, class_dropout_prob=0.0, enable_flashattn=True)
