"""Muon in float32 on a CPU: torch's own, but for rounding."""

import pytest
import torch

from stdit_train.optim.muon import Muon, orthogonalised

SHAPES = [(24, 24), (144, 24), (24, 96)]


def after(kind: type[torch.optim.Muon], **options: object) -> list[torch.Tensor]:
    """What five steps make of matrices with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    start = [weight.detach().clone() for weight in weights]
    optimizer = kind(weights, lr=0.02, **options)  # type: ignore[arg-type]
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach() - before for weight, before in zip(weights, start, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"weight_decay": 0.5}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str
)
def test_is_torchs_but_for_bfloat16(options: dict[str, object]) -> None:
    for ours, theirs in zip(after(Muon, **options), after(torch.optim.Muon, **options), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.5
    inner = before.U.T @ found @ before.Vh.T  # the same singular vectors
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-3


def test_weights_without_gradient_stay_and_the_closure_is_called() -> None:
    still, moved = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))

    def closure() -> float:
        assert torch.is_grad_enabled()
        moved.grad = torch.eye(4)
        return 7.0

    assert Muon([still, moved], lr=0.1).step(closure) == 7.0
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))
