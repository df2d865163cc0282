"""Routing replay: the picks of one forward pass, recorded and taken again in another.

A rollout engine and the training pass round differently, and a pick on the edge may then fall to another expert.
Replaying fixes the picks; their weights come from the router's scores as ever. `RoutingReplay` speaks the interface of
Megatron's `RouterReplay` (which keeps every instance of a process in one list).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.router import TopKRouter

from ..errors import UserError
from ..runtime.process_groups import device
from .stats import decoder_routers, layer_of


class RoutingReplay:
    """Picks of one router.

    Ids lie in [0, N+Nz); a pick that a paired zero expert took is its real expert's id plus N. -1 leaves a pick to
    the router.

    Attributes:
        recording: keep the picks of every pass in `recorded_TK`.
        target_TK: int64 picks that the next pass has to take, or None.
        recompute: blocks are run twice in training; the first pass leaves its target in a queue for the second.
    """

    def __init__(self, num_real: int, recompute: bool):
        self.num_real, self.recompute = num_real, recompute
        self.recording = False
        self.recorded_TK: torch.Tensor | None = None
        self.target_TK: torch.Tensor | None = None
        self._waiting: deque[torch.Tensor | None] = deque()
        self._now_TK: torch.Tensor | None = None

    def begin(self, training: bool) -> None:
        """Before each pass of the router: decide what it takes. Backward passes come in the order of forward ones."""
        self._now_TK = self.target_TK
        if training and self.recompute:
            if torch.is_grad_enabled():
                self._now_TK = self._waiting.popleft()
            else:
                self._waiting.append(self.target_TK)

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and ids of the picks, [T, K] each, for scores [T, E]."""
        values_TK, ids_TK = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._now_TK is not None:
            target_TK = self._now_TK.to(scores.device)
            if target_TK.shape != ids_TK.shape:
                raise ValueError(
                    f"replayed picks have shape {tuple(target_TK.shape)}, the router's {tuple(ids_TK.shape)}"
                )
            if scores.shape[1] == self.num_real:  # paired routing adds no rows: the id says who took the pick
                target_TK = target_TK.where(target_TK < 0, target_TK % self.num_real)
            ids_TK = ids_TK.where(target_TK < 0, target_TK)
            values_TK = scores.gather(1, ids_TK)
        if self.recording:
            self.recorded_TK = ids_TK
        return values_TK, ids_TK

    def kept(self, kept_TN: torch.Tensor) -> torch.Tensor:
        """Paired routing: the map [T, N] of picks that real experts keep, as decided now or then; records it."""
        if self._now_TK is not None:
            target_TK = self._now_TK.to(kept_TN.device)
            then_TN = torch.zeros_like(kept_TN).scatter(
                1, target_TK.clamp(min=0) % self.num_real, target_TK < self.num_real
            )
            kept_TN = then_TN.where((target_TK >= 0).all(1, keepdim=True), kept_TN)
        if self.recording:
            skipped_TK = ~kept_TN.gather(1, self.recorded_TK)
            self.recorded_TK = self.recorded_TK + self.num_real * skipped_TK
        return kept_TN


@contextmanager
def recording(model_chunks) -> Iterator[None]:
    """Let all routers keep the picks of their last pass."""
    mine = _require(model_chunks)
    before = [router.router_replay for router in mine]
    for router in mine:
        router.router_replay = RoutingReplay(router.num_real, recompute=False)
        router.router_replay.recording = True
    try:
        yield
    finally:
        for router, replay in zip(mine, before, strict=True):
            router.router_replay = replay


def recorded_picks(model_chunks: list[torch.nn.Module], tokens: int) -> torch.Tensor:
    """Picks of the last pass, of so many tokens, in every decoder layer: int16 [T, L, K]; -1 in layers without experts
    and in those of other pipeline stages."""
    config = model_chunks[0].config
    picks_TLK = torch.full((tokens, config.num_layers, config.moe_router_topk), -1, dtype=torch.int16)
    picks_TLK = picks_TLK.to(device())
    for router in decoder_routers(model_chunks):
        picks_TLK[:, layer_of(router)] = router.router_replay.recorded_TK.to(torch.int16)
    return picks_TLK


def enable_replay(model_chunks) -> None:
    """Give all routers of a model that trains a replay; it does nothing until `set_targets`."""
    for router in _require(model_chunks):
        recompute = router.config.recompute_granularity is not None
        router.router_replay = RoutingReplay(router.num_real, recompute)


def set_targets(model_chunks, picks_TLK: torch.Tensor | None) -> None:
    """Picks that the next training pass has to take: [T, L, K] as in `recorded_picks`, or None.

    T may be the whole row under sequence parallelism: each rank takes its part.
    """
    for router in decoder_routers(model_chunks):
        if picks_TLK is None:
            router.router_replay.target_TK = None
            continue
        mine = picks_TLK[:, layer_of(router)].long()
        if router.config.sequence_parallel:
            mine = mine.chunk(router.tp_group.size())[router.tp_group.rank()]
        router.router_replay.target_TK = mine


def _require(model_chunks) -> list:
    """Routers that know replay: those of this pipeline stage, which may have none."""
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    mine = decoder_routers(chunks)
    if not mine and any(isinstance(module, TopKRouter) for chunk in chunks for module in chunk.modules()):
        raise UserError(
            "--routing-replay: this model has Megatron's own routers (a static model with a per-expert loss); use "
            "--moe-router-load-balancing-type none"
        )
    return mine
