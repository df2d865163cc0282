"""Stand-ins for the buffers of DeepEP and HybridEP, after their documented contract, on torch.distributed.

Megatron's own autograd functions (`fused_a2a`) run on them; rows really travel. DeepEP: a token goes once to every
rank where it has an expert, -1 is no expert, numbers arrive as those of the local experts (-1: not here) with
weight 0 where not here; `combine` adds up what the ranks return, 0 for tokens sent nowhere. HybridEP: takes the
routing map and hands out rows sorted by expert, in a buffer of `num_permuted_tokens` rows where that is given.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch


@dataclass
class Exchange:
    """Who sends which of its tokens where; `handle` of both."""

    group: object
    tokens: int
    sent_to: list[torch.Tensor]
    """Per rank, the tokens (by number) that go there, in order; a token may go several times."""
    received: list[int] = field(default_factory=list)
    """Rows that come from each rank."""

    def __post_init__(self):
        mine = torch.tensor([len(x) for x in self.sent_to])
        counts = [torch.empty_like(mine) for _ in self.sent_to]
        torch.distributed.all_gather(counts, mine, group=self.group)
        self.received = [int(c[self.group.rank()]) for c in counts]

    def there(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Send a piece to every rank."""
        return self._exchange(torch.cat(pieces), [len(x) for x in pieces], self.received)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what was received; [T, ...] with the sums."""
        home = self._exchange(rows, self.received, [len(x) for x in self.sent_to])
        return home.new_zeros(self.tokens, *home.shape[1:]).index_add(0, torch.cat(self.sent_to), home)

    def _exchange(self, rows, leaving, coming):
        arrived = rows.new_empty(sum(coming), *rows.shape[1:])
        torch.distributed.all_to_all_single(arrived, rows.contiguous(), coming, leaving, group=self.group)
        return arrived


class Event:
    """EventHandle and EventOverlap."""

    def __init__(self, *args):
        pass

    def current_stream_wait(self):
        pass


class DeepepBuffer:
    """deep_ep.Buffer of one group. Attributes: indices_seen, every `topk_idx` that came in."""

    def __init__(self, group):
        self.group, self.indices_seen = group, []

    def get_dispatch_layout(self, topk_idx, num_experts, **kwargs):
        ranks = self.group.size()
        owner = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // ranks))
        in_rank = torch.stack([(owner == rank).any(1) for rank in range(ranks)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank.sum(0), None, per_expert, in_rank, Event()

    def dispatch(
        self,
        x,
        handle=None,
        topk_idx=None,
        topk_weights=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        **kwargs,
    ):
        if handle is not None:
            return handle.there([x[where] for where in handle.sent_to]), None, None, None, None, Event()
        assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
        self.indices_seen.append(topk_idx)
        per_rank = len(num_tokens_per_expert) // self.group.size()
        handle = Exchange(self.group, len(x), [column.nonzero().flatten() for column in is_token_in_rank.t()])
        numbers, weights = [], []
        for rank, where in enumerate(handle.sent_to):
            local = topk_idx[where] - rank * per_rank
            here = (topk_idx[where] >= 0) & (local >= 0) & (local < per_rank)
            numbers.append(torch.where(here, local, -1))
            weights.append(torch.where(here, topk_weights[where], 0.0))
        rows = handle.there([x[where] for where in handle.sent_to])
        number, weight = handle.there(numbers), handle.there(weights)
        counts = torch.bincount(number[number >= 0], minlength=per_rank).tolist()
        return rows, number, weight, counts, handle, Event()

    def combine(self, x, handle, topk_weights=None, **kwargs):
        weights = None if topk_weights is None else handle.back(topk_weights)
        return handle.back(x), weights, Event()


class HybridBuffer:
    """deep_ep.HybridEPBuffer of one group. Attributes: maps_seen, every routing map that came in."""

    def __init__(self, group):
        self.group, self.maps_seen = group, []

    def dispatch_with_permute(
        self,
        hidden,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_of_experts_per_rank=None,
        pad_multiple=None,
        num_permuted_tokens=None,
        non_blocking=False,
        handle=None,
    ):
        assert not pad_multiple and scaling_factor is None
        if handle is None:
            assert probs.dtype == torch.float32 and routing_map.dtype == torch.bool
            self.maps_seen.append(routing_map)
            columns = [map_TL.t().nonzero() for map_TL in routing_map.split(num_of_experts_per_rank, dim=1)]
            exchange = Exchange(self.group, len(hidden), [c[:, 1] for c in columns])
            experts = exchange.there([c[:, 0] for c in columns])
            handle = (exchange, columns, experts.argsort(stable=True), num_of_experts_per_rank)
            counts = torch.bincount(experts, minlength=num_of_experts_per_rank)
        else:
            counts = None
        exchange, columns, order, per_rank = handle
        rows = exchange.there([hidden[where] for where in exchange.sent_to])[order]
        weights = None
        if probs is not None:
            weights = [probs[c[:, 1], rank * per_rank + c[:, 0]] for rank, c in enumerate(columns)]
            weights = exchange.there(weights)[order]
        if num_permuted_tokens is not None:
            buffer = rows.new_full((int(num_permuted_tokens), rows.shape[1]), float("nan"))
            buffer[: len(rows)] = rows
            rows = buffer
        return rows, weights, None, counts, handle

    def combine_with_unpermute(self, hidden, handle, probs=None, pad_multiple=None):
        exchange, columns, order, per_rank = handle
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        combined = exchange.back(hidden[: len(order)][back])
        if probs is None:
            return combined, None
        home = exchange._exchange(probs[back], exchange.received, [len(c) for c in columns])
        weights = home.new_zeros(exchange.tokens, per_rank * len(columns))
        places = torch.cat([c[:, 1] for c in columns])
        experts = torch.cat([c[:, 0] + rank * per_rank for rank, c in enumerate(columns)])
        weights[places, experts] = home
        return combined, weights


def install(monkeypatch, group) -> tuple[DeepepBuffer, HybridBuffer]:
    """Let Megatron's flex dispatcher find both for the length of a test."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    deepep, hybrid = DeepepBuffer(group), HybridBuffer(group)
    for name in ("EventHandle", "EventOverlap"):
        monkeypatch.setattr(fused_a2a, name, Event, raising=False)
    monkeypatch.setattr(fused_a2a, "get_buffer", lambda group, size: deepep)
    monkeypatch.setattr(fused_a2a, "_hybrid_ep_buffer", hybrid)

    def fused_dispatch(x, indices, probs, experts, group, async_finish=False, allocate_on_comm_stream=False):
        return fused_a2a.FusedDispatch.apply(
            x.contiguous(), indices, probs, experts, group, async_finish, allocate_on_comm_stream
        )

    def fused_combine(x, group, handle, async_finish=False, allocate_on_comm_stream=False):
        return fused_a2a.FusedCombine.apply(x, group, handle, async_finish, allocate_on_comm_stream)

    def hybrid_ep_dispatch(**named):
        return by_name(fused_a2a.HybridEPDispatch, **named)

    def hybrid_ep_combine(**named):
        return by_name(fused_a2a.HybridEPCombine, **named)

    for function in (fused_dispatch, fused_combine, hybrid_ep_dispatch, hybrid_ep_combine):
        monkeypatch.setattr(token_dispatcher, function.__name__, function)
    monkeypatch.setattr(token_dispatcher, "set_deepep_num_sms", lambda number: None)
    return deepep, hybrid


def by_name(function: type[torch.autograd.Function], **named):
    """Call it with named arguments: which there are, and where, differs between Megatron's versions."""
    given = inspect.signature(function.forward).bind(None, **named)
    given.apply_defaults()
    return function.apply(*given.args[1:])
