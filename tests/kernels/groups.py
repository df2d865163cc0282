"""Inputs of the grouped operators, for tests on any device."""

from __future__ import annotations

import torch


def ends_of(counts: list[int], device="cpu") -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0).to(torch.int32).to(device)


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, device="cpu", grad: bool = False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.grad = dtype, device, grad

    def __call__(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * 0.5
        return values.to(self.device, self.dtype).requires_grad_(self.grad)

    def experts(self, count: int, *shape: int) -> list[torch.Tensor]:
        return [self(*shape) for _ in range(count)]


def mlp_inputs(counts: list[int], hidden: int, width: int, extra_rows: int = 0, **kind):
    """x, probs, ends, fc1, fc2 of an expert MLP; `extra_rows` belong to no expert."""
    draw = Draw(**kind)
    rows = sum(counts) + extra_rows
    x, probs = draw(rows, hidden), draw(rows)
    ends = ends_of(counts, draw.device)
    fc1, fc2 = draw.experts(len(counts), 2 * width, hidden), draw.experts(len(counts), hidden, width)
    return x, probs, ends, fc1, fc2


def fc1_inputs(counts: list[int], width: int, hidden: int, extra_rows: int, device="cpu"):
    """x, fc1, probs, ends of the first product in bfloat16; rows past the last end hold NaN."""
    draw, real = Draw(dtype=torch.bfloat16, device=device), sum(counts)
    x, probs = draw(real + extra_rows, hidden), draw(real + extra_rows).float()
    x[real:], probs[real:] = float("nan"), float("nan")
    return x, draw.experts(len(counts), 2 * width, hidden), probs, ends_of(counts, device)


def exact(part):
    """Tensors, or lists of them, as float64 on the CPU."""
    if isinstance(part, list | tuple):
        return [exact(p) for p in part]
    return part.detach().cpu().double() if part.is_floating_point() else part.cpu()


def near(mine, expected, bound: float) -> None:
    """No number is missing, and the error is at most `bound` of the whole."""
    mine, expected = mine.detach().cpu().double(), expected.double()
    assert mine.isfinite().all()
    size = expected.norm()
    assert (mine - expected).norm() <= bound * size if size else not mine.any()
