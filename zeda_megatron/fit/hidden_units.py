"""Hidden units for the heads of one layer, by gradient descent on rows that were kept; starts from the ridge fit.

A head with hidden units predicts U_i.x + c_i + V_i.silu(W x + d); W and d belong to all experts of the layer. Inputs
are taken relative to their mean, in their standard deviations, so that one learning rate does for every layer and
model. The same seed draws the first W and the rows of every step: the same rows give the same heads, bit for bit. The
last rows are kept back, and the heads that do best on them win: with little text that is the ridge fit itself.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

STEPS, BATCH, LEARNING_RATE, WARMUP = 600, 4096, 0.03, 20
"""Chosen on rollouts of the quickstart's teacher: twice the steps, or four times the rows, explain 1% more."""
KEPT_BACK, CHECK_EVERY = 8, 20
"""One row of so many is kept back; the error on those is looked at after so many steps."""
MOST_ROWS = 200_000
"""Rows of a layer that are kept on each rank."""


def store_bytes(hidden_size: int, width: int) -> int:
    """Memory of a layer's rows, in 2 bytes a number or 4."""
    return MOST_ROWS * (hidden_size * width + 12)


class RowStore:
    """Some rows of one layer, at most `most` and those just added, each kept with the same probability."""

    def __init__(self, most: int = MOST_ROWS, seed: int = 0):
        self.most, self._parts, self._count, self._keep = most, [], 0, 1.0
        self._draw = torch.Generator().manual_seed(seed)

    def add(self, x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor) -> None:
        """Rows in any order."""
        self._put((x_RH, y_R, expert_R), self._keep)
        while self._count > self.most:
            self._keep /= 2
            rows, self._parts, self._count = self.rows(), [], 0
            self._put(rows, 0.5)

    def _put(self, rows: tuple[torch.Tensor, ...], keep: float) -> None:
        if keep < 1:
            kept = (torch.rand(len(rows[1]), generator=self._draw) < keep).to(rows[1].device)
            rows = tuple(part[kept] for part in rows)
        else:
            rows = tuple(part.clone() for part in rows)
        self._parts.append(rows)
        self._count += len(rows[1])

    def rows(self) -> tuple[torch.Tensor, ...]:
        """x [R, H], what is to be predicted [R], local expert [R]."""
        return tuple(torch.cat(parts) for parts in zip(*self._parts))


@torch.enable_grad()
def fit_hidden_units(
    rows: tuple[torch.Tensor, ...],
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor,
    width: int,
    replicas,
    world=None,
) -> dict[str, torch.Tensor]:
    """Heads of the local experts, float32, by the names of `moe.paired.PairedZeroExperts`.

    Args:
        rows: of this rank, see `RowStore.rows`.
        weight_EH: U and `bias_E`: c, of the ridge fit, which the descent moves too.
        replicas: process group of the ranks that hold the same experts. world: of all ranks (None: the default).
    """
    x_RH, y_R, expert_R = rows
    hidden, device = x_RH.shape[1], x_RH.device
    sums = torch.stack([x_RH.sum(0, dtype=torch.float64), x_RH.double().square().sum(0)])
    total = _sum(torch.tensor(float(len(y_R)), dtype=torch.float64, device=device), world)
    mean, square = _sum(sums, world) / total
    std = (square - mean.square()).clamp(min=1e-12).sqrt().float()
    mean = mean.float()
    first = torch.randn(width, hidden, generator=torch.Generator().manual_seed(0)) / hidden**0.5
    named = {
        "weight": weight_EH * std,
        "bias": bias_E + weight_EH @ mean,
        "hidden_weight": first.to(device),
        "hidden_bias": torch.zeros(width, device=device),
        "hidden_output": torch.zeros(len(bias_E), width, device=device),
    }
    named = {name: part.clone().requires_grad_() for name, part in named.items()}
    rates = {"weight": LEARNING_RATE / hidden**0.5, "hidden_weight": LEARNING_RATE / hidden**0.5}
    groups = [{"params": [part], "lr": rates.get(name, LEARNING_RATE)} for name, part in named.items()]
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARMUP) * (1 - i / STEPS))

    def error_sum(chosen: torch.Tensor) -> torch.Tensor:
        x, expert = (x_RH[chosen].float() - mean) / std, expert_R[chosen]
        unit = F.silu(F.linear(x, named["hidden_weight"], named["hidden_bias"]))
        # Of all experts, then the right one: the backward pass of weights gathered by row would add up in any order.
        found = F.linear(x, named["weight"], named["bias"]) + F.linear(unit, named["hidden_output"])
        return (found.gather(1, expert[:, None])[:, 0] - y_R[chosen]).square().sum()

    learned = len(y_R) - len(y_R) // KEPT_BACK
    back = torch.arange(learned, len(y_R), device=device)
    draw = torch.Generator().manual_seed(1)
    batch = max(round(BATCH * len(y_R) / float(total)), 1) if learned else 0
    drawn = _sum(torch.tensor(float(batch), device=device), world)
    best, least = None, float("inf")
    for step in range(STEPS + 1):
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                now = float(_sum(error_sum(back).double(), world))
            if now < least:
                best, least = {name: part.detach().clone() for name, part in named.items()}, now
        if step == STEPS:
            break
        chosen = torch.randint(0, max(learned, 1), (batch,), generator=draw).to(device)
        optimizer.zero_grad()
        (error_sum(chosen) / drawn).backward()
        for name, part in named.items():
            _sum(part.grad, world if name in ("hidden_weight", "hidden_bias") else replicas)
        optimizer.step()
        decay.step()
    for weight, bias in (("weight", "bias"), ("hidden_weight", "hidden_bias")):
        best[weight] = best[weight] / std
        best[bias] = best[bias] - best[weight] @ mean
    return best


def _sum(values: torch.Tensor, group) -> torch.Tensor:
    """Over the ranks of a group, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(values, group=group)
    return values
