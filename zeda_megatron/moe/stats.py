"""Routing statistics: how many slots chose a zero expert, per layer; no global state.

Each router owns a `RoutingStats`; `collect` reads them from a model and adds them up over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class RoutingStats:
    """Running sums of one router since the last `reset`."""

    zero_slots: torch.Tensor | None = None
    """Slots that chose a zero expert or were dropped by a pick rule (0-d, int64)."""
    slots: torch.Tensor | None = None
    """All routed slots, padding not counted (0-d, int64)."""
    group_loss: torch.Tensor | None = None
    """Sum of this rank's parts of the group loss, without alpha (0-d, float32)."""
    group_loss_calls: int = 0
    """Micro-batches summed in `group_loss`."""
    record_tokens: bool = False
    """Also keep the number of real picks of every token (evaluation)."""
    real_picks_T: list[torch.Tensor] = field(default_factory=list)
    """One [T] tensor per forward pass while `record_tokens` is on."""

    def count(self, real_T: torch.Tensor, valid_T: torch.Tensor | None, topk: int) -> None:
        """Add one forward pass: real picks per token, which tokens are no padding, K."""
        if self.record_tokens:
            self.real_picks_T.append(real_T.detach().clone())
        valid = real_T.numel() if valid_T is None else valid_T.sum()
        real = real_T.sum() if valid_T is None else (real_T * valid_T).sum()
        slots = torch.as_tensor(valid * topk, device=real_T.device, dtype=torch.int64)
        self.slots = slots if self.slots is None else self.slots + slots
        zero = slots - real.long()
        self.zero_slots = zero if self.zero_slots is None else self.zero_slots + zero

    def add_group_loss(self, part: torch.Tensor) -> None:
        part = part.detach().float()
        self.group_loss = part if self.group_loss is None else self.group_loss + part
        self.group_loss_calls += 1

    def reset(self) -> None:
        self.zero_slots = self.slots = self.group_loss = None
        self.group_loss_calls = 0
        self.real_picks_T.clear()


@dataclass(frozen=True)
class StatsReport:
    """Statistics over all ranks. Layers without experts have share None."""

    zero_share: float
    """Zero slots / all slots over all MoE layers."""
    zero_share_by_layer: list[float | None]
    """The same per decoder layer."""
    group_loss: float
    """Mean over micro-batches of the group loss summed over layers, without alpha."""


def routers(model_chunks) -> list:
    """All zero-expert routers of a model (or list of pipeline chunks), in layer order."""
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    found = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "routing_stats")]
    return sorted(found, key=lambda router: router.layer_number or 0)


def reset(model_chunks) -> None:
    """Set all routing statistics of a model to zero."""
    for router in routers(model_chunks):
        router.routing_stats.reset()


def collect(model_chunks, num_layers: int, device: torch.device, reset_after: bool = True) -> StatsReport:
    """Add the statistics up over all processes. Every process must call it, with or without MoE layers.

    The sums travel as one [num_layers, 4] tensor, so a pipeline stage without MoE layers neither hangs nor
    shifts the layer numbers. Ranks that hold copies of the same tokens (tensor parallelism without sequence
    parallelism) scale zero slots and slots alike, so shares are exact.
    """
    table = torch.zeros(num_layers, 4, dtype=torch.float64)
    for router in routers(model_chunks):
        s = router.routing_stats
        row = table[(router.layer_number or 1) - 1]
        if s.slots is not None:
            row[0], row[1] = float(s.zero_slots), float(s.slots)
        if s.group_loss is not None:
            # Parts add up over the ranks that share a loss; micro-batches are averaged.
            row[2], row[3] = float(s.group_loss), s.group_loss_calls / router.group_loss_ranks
        if reset_after:
            s.reset()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        table = table.to(device)
        torch.distributed.all_reduce(table)
        table = table.cpu()
    zero, slots, loss, calls = table.unbind(1)
    return StatsReport(
        zero_share=float(zero.sum() / slots.sum()) if slots.sum() > 0 else 0.0,
        zero_share_by_layer=[float(z / n) if n > 0 else None for z, n in zip(zero, slots)],
        group_loss=float(torch.where(calls > 0, loss / calls.clamp(min=1e-12), loss * 0).sum()),
    )
