"""Routing statistics: how many slots chose a zero expert, per layer; no global state.

Each router owns a `RoutingStats`; `collect` reads them from a model and adds them up over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .pick_rules import needed_together

DECODED_TOGETHER = 16
"""Tokens of a group whose experts are counted: what a decoding step of so many answers has to load."""
SCORE_RANGE = (-24.0, 24.0)
"""Scores are logarithms of relative contributions (or a learned mask's logits)."""
SCORE_BINS = 6144
"""Bins of 1/128: one bin near the median holds about 0.3% of the picks, and quantiles interpolate in it."""


@dataclass
class RoutingStats:
    """Running sums of one router since the last `reset`."""

    zero_slots: torch.Tensor | None = None
    """Slots that chose a zero expert or were dropped by a pick rule (0-d, int64)."""
    slots: torch.Tensor | None = None
    """All routed slots, padding not counted (0-d, int64)."""
    group_loss: torch.Tensor | None = None
    """Sum of this rank's parts of the group loss, without alpha (0-d, float32)."""
    group_loss_calls: torch.Tensor | None = None
    """Micro-batches summed in `group_loss`, without those of padding alone (0-d)."""
    score_counts: torch.Tensor | None = None
    """Histogram of the scores of all picks (paired routing), [SCORE_BINS] int64 over SCORE_RANGE."""
    recording: bool = False
    """Also keep the three below (evaluation)."""
    real_picks_T: list[torch.Tensor] = field(default_factory=list)
    """Number of real picks of every token: one [T] tensor per forward pass."""
    picks_2N: torch.Tensor | None = None
    """[2, N] int64: the router's picks of each real expert, and those it kept."""
    loaded: torch.Tensor | None = None
    """[2] int64: real experts that `DECODED_TOGETHER` tokens need, summed over such groups; and the groups."""

    def count(self, real_T: torch.Tensor, valid_T: torch.Tensor | None, topk: int) -> None:
        """Add one forward pass: real picks per token, which tokens are no padding, K."""
        if self.recording:
            self.real_picks_T.append(real_T.detach().clone())
        valid = real_T.numel() if valid_T is None else valid_T.sum()
        real = real_T.sum() if valid_T is None else (real_T * valid_T).sum()
        slots = torch.as_tensor(valid * topk, device=real_T.device, dtype=torch.int64)
        self.slots = slots if self.slots is None else self.slots + slots
        zero = slots - real.long()
        self.zero_slots = zero if self.zero_slots is None else self.zero_slots + zero

    def add_picks(self, map_TN: torch.Tensor, kept_TN: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Count the picks of one pass per expert, if they are recorded."""
        if not self.recording:
            return
        both = torch.stack([map_TN, kept_TN])
        counts = (both if valid_T is None else both & valid_T[:, None]).sum(1)
        self.picks_2N = counts if self.picks_2N is None else self.picks_2N + counts
        _, needed_GN = needed_together(kept_TN if valid_T is None else kept_TN[valid_T], DECODED_TOGETHER)
        loaded = torch.stack([needed_GN.sum(), torch.tensor(len(needed_GN), device=needed_GN.device)])
        self.loaded = loaded if self.loaded is None else self.loaded + loaded

    def add_scores(self, score_TN: torch.Tensor, map_TN: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add the scores of one pass's picks to the histogram; values outside the range count at its ends."""
        if valid_T is not None:
            map_TN = map_TN & valid_T[:, None]
        low, high = SCORE_RANGE
        place_TN = (score_TN.detach() - low) * (SCORE_BINS / (high - low))
        place_TN = place_TN.long().clamp(0, SCORE_BINS - 1)
        # Not the picked scores alone: how many there are the host would have to wait for.
        counts = torch.zeros(SCORE_BINS, dtype=torch.int64, device=map_TN.device)
        counts.scatter_add_(0, place_TN.flatten(), map_TN.flatten().long())
        self.score_counts = counts if self.score_counts is None else self.score_counts + counts

    def add_group_loss(self, part: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add one micro-batch's loss over this many tokens (0-d each)."""
        part, call = part.detach().float(), (tokens > 0).int()
        self.group_loss = part if self.group_loss is None else self.group_loss + part
        self.group_loss_calls = call if self.group_loss_calls is None else self.group_loss_calls + call

    def reset(self) -> None:
        self.zero_slots = self.slots = self.score_counts = self.picks_2N = self.loaded = None
        self.group_loss = self.group_loss_calls = None
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
    score_counts: torch.Tensor | None = None
    """Histogram of pick scores, float64: [1, SCORE_BINS] over all layers or [num_layers, SCORE_BINS]; None without
    paired routing."""
    mtp_zero_share: float | None = None
    """Zero share of the multi-token-prediction head's layer, which none of the figures above counts; None: no such head
    has run."""
    mtp_group_loss: float = 0.0
    """Group loss of that layer, as above."""


def routers(model_chunks) -> list:
    """All zero-expert routers of a model (or list of pipeline chunks), in layer order; that of a multi-token-prediction
    head comes last."""
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    found = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "routing_stats")]
    return sorted(found, key=lambda router: router.layer_number or 0)


def decoder_routers(model_chunks) -> list:
    """`routers` of the decoder's layers alone."""
    return [router for router in routers(model_chunks) if not router.in_mtp_head]


def reset(model_chunks) -> None:
    """Set all routing statistics of a model to zero."""
    for router in routers(model_chunks):
        router.routing_stats.reset()


def collect(
    model_chunks,
    num_layers: int,
    device: torch.device,
    reset_after: bool = True,
    scores_by_layer: bool = False,
) -> StatsReport:
    """Add the statistics up over all processes. Every process must call it, with or without MoE layers.

    The sums travel as one tensor with a row per layer, so a pipeline stage without MoE layers neither hangs nor
    shifts the layer numbers. Ranks that hold copies of the same tokens (tensor parallelism without sequence
    parallelism) scale zero slots and slots alike, so shares are exact. The last row is that of a multi-token-prediction
    head: figures of the decoder mean what they mean without it.
    """
    # Nothing goes to the host before all is added up: every copy waits for the device.
    table = torch.zeros(num_layers + 1, 4, dtype=torch.float64, device=device)
    scores = torch.zeros(num_layers if scores_by_layer else 1, SCORE_BINS, dtype=torch.float64, device=device)
    for router in routers(model_chunks):
        s, layer = router.routing_stats, -1 if router.in_mtp_head else layer_of(router)
        if s.slots is not None:
            table[layer, :2] = torch.stack([s.zero_slots, s.slots])
        if s.group_loss is not None:
            # Parts add up over the ranks that share a loss; micro-batches are averaged.
            table[layer, 2:] = torch.stack([s.group_loss, s.group_loss_calls / router.group_loss_ranks])
        if s.score_counts is not None and not router.in_mtp_head:
            scores[layer if scores_by_layer else 0] += s.score_counts.to(device)
        if reset_after:
            s.reset()
    table, scores = _sum_over_ranks(device, table, scores)
    zero, slots, loss, calls = table.unbind(1)
    shares = [share if n > 0 else None for n, share in torch.stack([slots, zero / slots], dim=1).tolist()]
    losses = torch.where(calls > 0, loss / calls.clamp(min=1e-12), loss * 0)
    zero, slots = zero[:-1].sum(), slots[:-1].sum()
    return StatsReport(
        zero_share=float(zero / slots) if slots > 0 else 0.0,
        zero_share_by_layer=shares[:-1],
        group_loss=float(losses[:-1].sum()),
        score_counts=scores if scores.any() else None,
        mtp_zero_share=shares[-1],
        mtp_group_loss=float(losses[-1]),
    )


def zero_share(model_chunks, reset_after: bool = True) -> float:
    """Zero picks / all picks since the last call, over all layers and processes. Every process must call it."""
    found = decoder_routers(model_chunks)
    device = found[0].weight.device if found else torch.device("cpu")
    layers = 1 + max(map(layer_of, found), default=0)
    return collect(model_chunks, layers, device, reset_after).zero_share


@contextmanager
def evaluating(model_chunks) -> Iterator[None]:
    """`with evaluating(model): ...` runs it in evaluation mode, with fresh statistics.

    Mode and statistics are as before afterwards, whatever happens inside.
    """
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    modes = [(chunk, chunk.training) for chunk in chunks]
    mine = [(router, router.routing_stats) for router in routers(chunks)]
    try:
        for chunk in chunks:
            chunk.eval()
        for router, _ in mine:
            router.routing_stats = RoutingStats()
        yield
    finally:
        for router, kept in mine:
            router.routing_stats = kept
        for chunk, training in modes:
            chunk.train(training)


def record(model_chunks) -> None:
    """Let all routers also keep the number of real picks of every token, and count the picks of every expert, while
    these statistics last (`evaluating`)."""
    for router in routers(model_chunks):
        router.routing_stats.recording = True


def collect_experts(
    model_chunks, num_layers: int, num_experts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks of every real expert and those it kept, [num_layers, N] float64 each, over all processes."""
    picks = torch.zeros(num_layers, 2, num_experts, dtype=torch.float64, device=device)
    for router in decoder_routers(model_chunks):
        if router.routing_stats.picks_2N is not None:
            picks[layer_of(router)] += router.routing_stats.picks_2N.to(device)
    (picks,) = _sum_over_ranks(device, picks)
    return picks[:, 0], picks[:, 1]


def loaded_share(model_chunks) -> float:
    """Share of a layer's real experts that `DECODED_TOGETHER` tokens need, over this process's layers and recorded
    passes."""
    mine = [router for router in decoder_routers(model_chunks) if router.routing_stats.loaded is not None]
    shares = [router.routing_stats.loaded.double() for router in mine]
    needed = sum(experts / router.num_real for (experts, _), router in zip(shares, mine, strict=True))
    return float(needed / sum(groups for _, groups in shares))


def take_skipped(model_chunks) -> torch.Tensor:
    """Share of each token's picks, over this process's MoE layers, that no real expert computed.

    Returns:
        [T] float64, padding included, in the order of the forward passes since tokens were recorded or last
        taken; they are forgotten here.
    """
    mine = decoder_routers(model_chunks)
    real_T = sum(torch.cat(router.routing_stats.real_picks_T).double() for router in mine)
    for router in mine:
        router.routing_stats.real_picks_T.clear()
    return 1.0 - real_T / sum(router.topk for router in mine)


def layer_of(router) -> int:
    """Row of a router's layer in tables over all layers."""
    return (router.layer_number or 1) - 1


def _sum_over_ranks(device: torch.device, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All tables summed over all processes, in one message; on the host, in one copy."""
    flat = torch.cat([table.flatten() for table in tables]).to(device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(flat)
    parts = flat.cpu().split([table.numel() for table in tables])
    return tuple(part.view_as(table) for part, table in zip(parts, tables))
