"""The expert MLP over rows sorted by expert: a gated unit, weighted by the routing probability.

`grouped_mlp` has three implementations with the same meaning: a plain loop (the reference),
`torch.nn.functional.grouped_mm`, which is faster on the CPU too, and kernels that another distribution brings: those
know the plain SwiGLU without biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .expert_kernels import installed

BACKENDS = ("loop", "grouped_mm", "kernels")


@dataclass(frozen=True)
class GatedUnit:
    """act(gate) * (up + offset)."""

    act: Callable[[torch.Tensor], torch.Tensor] = F.silu
    """Activation of the gate."""
    clamp: float | None = None
    """Largest gate, and largest |up|, before the activation; None: any."""
    offset: float = 0.0
    """Added to up."""

    def __call__(self, hidden_RF: torch.Tensor) -> torch.Tensor:
        """[R, 2F], gate first -> [R, F]."""
        gate, up = hidden_RF.chunk(2, dim=-1)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return self.act(gate) * (up + self.offset if self.offset else up)


SWIGLU = GatedUnit()


@dataclass(frozen=True)
class LowRank:
    """What low-rank adapters add to both products: scale * up_e (down_e x) for each expert e, of rank D."""

    fc1_down: torch.Tensor
    """[E, D, H]."""
    fc1_up: torch.Tensor
    """[E, 2F, D]."""
    fc2_down: torch.Tensor
    """[E, D, F]."""
    fc2_up: torch.Tensor
    """[E, H, D]."""
    scale: float
    """Factor of what is added."""


def grouped_mlp(
    rows_RH: torch.Tensor,
    probs_R: torch.Tensor,
    counts: torch.Tensor | list[int],
    fc1_weights: list[torch.Tensor],
    fc2_weights: list[torch.Tensor],
    backend: str,
    unit: GatedUnit = SWIGLU,
    biases: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """Apply expert e to its `counts[e]` rows: fc2_e( unit(fc1_e x + b1_e) * prob ) + b2_e * prob.

    Args:
        rows_RH: [R, H] rows sorted by expert, R = sum(counts); counts may be 0, and on any device.
        probs_R: [R] routing weights.
        fc1_weights: per expert [2F, H], gate rows first. fc2_weights: per expert [H, F].
        backend: one of `BACKENDS`; `kernels` are for `SWIGLU` without biases and adapters.
        biases: b1 [2F] and b2 [H] per expert, or none.
        low_rank: adapters of both products, or none.

    Returns:
        [R, H] in the dtype of the rows.
    """
    counts = torch.as_tensor(counts)
    if backend == "loop":
        return reference_grouped_mlp(
            rows_RH, probs_R, counts.tolist(), fc1_weights, fc2_weights, unit, biases, low_rank
        )
    counts = counts.to(rows_RH.device, non_blocking=True)
    ends = counts.cumsum(0).to(torch.int32)
    if backend == "kernels":
        return installed().mlp(rows_RH, probs_R, ends, fc1_weights, fc2_weights)

    def product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)

    hidden = product(rows_RH, stacked(fc1_weights))
    if low_rank is not None:
        hidden = hidden + low_rank.scale * product(product(rows_RH, low_rank.fc1_down), low_rank.fc1_up)
    if biases is not None:
        first, second = (
            torch.stack(one).repeat_interleave(counts, 0, output_size=len(rows_RH)) for one in biases
        )
        hidden = hidden + first
    acted = (unit(hidden) * probs_R[:, None]).to(rows_RH.dtype)
    output_RH = product(acted, stacked(fc2_weights))
    if low_rank is not None:
        output_RH = output_RH + low_rank.scale * product(product(acted, low_rank.fc2_down), low_rank.fc2_up)
    if output_RH.requires_grad:
        output_RH.register_hook(torch.Tensor.contiguous)  # its backward refuses an expanded gradient
    if biases is not None:
        output_RH = output_RH + (second * probs_R[:, None]).to(rows_RH.dtype)
    return output_RH


def lay_side_by_side(weights: list[torch.Tensor]) -> None:
    """Move E matrices [N, K] into one piece of memory, one behind the other, so that `stacked` need not copy them.

    They stay the same objects. Those that lie in a buffer (Megatron's distributed optimizer has one) stay there.
    """
    if all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights):
        for weight, place in zip(weights, torch.stack([weight.data for weight in weights]).unbind(0)):
            weight.data = place


def stacked(weights: list[torch.Tensor]) -> torch.Tensor:
    """E matrices [N, K] as [E, N, K]: a view where they lie one behind the other, else a copy."""
    first, last = weights[0], weights[-1]
    begin, size = first.data_ptr(), first.nbytes
    if (
        any(weight.data_ptr() != begin + i * size for i, weight in enumerate(weights))
        or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr()
        or not first.is_contiguous()
    ):
        return torch.stack(weights)
    return _View.apply(*weights)


class _View(torch.autograd.Function):
    """`torch.stack` of matrices that lie one behind the other."""

    @staticmethod
    def forward(ctx, *weights: torch.Tensor) -> torch.Tensor:
        first = weights[0].detach()
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx, grad_ENK: torch.Tensor):
        return grad_ENK.unbind(0)


def reference_grouped_mlp(
    rows_RH,
    probs_R,
    counts,
    fc1_weights,
    fc2_weights,
    unit: GatedUnit = SWIGLU,
    biases=None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """The definition, one expert after the other, gradients by autograd."""
    parts = []
    for expert, (rows, probs) in enumerate(zip(rows_RH.split(counts), probs_R.split(counts))):
        fc1, fc2 = fc1_weights[expert], fc2_weights[expert]
        b1, b2 = (biases[0][expert], biases[1][expert]) if biases else (None, None)
        hidden = F.linear(rows, fc1, b1)
        if low_rank is not None:
            low = F.linear(rows, low_rank.fc1_down[expert])
            hidden = hidden + low_rank.scale * F.linear(low, low_rank.fc1_up[expert])
        acted = (unit(hidden) * probs[:, None]).to(rows.dtype)
        output = F.linear(acted, fc2)
        if low_rank is not None:
            low = F.linear(acted, low_rank.fc2_down[expert])
            output = output + low_rank.scale * F.linear(low, low_rank.fc2_up[expert])
        parts.append(output if b2 is None else output + (b2 * probs[:, None]).to(rows.dtype))
    return torch.cat(parts)
