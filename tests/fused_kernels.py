"""Stand-ins for Transformer Engine's fused permutation on the CPU, after its documented contract.

Output buffers have exactly the number of rows asked for and hold garbage where nothing is written. The edges are
those of Transformer Engine 2.x too: without rows `permute` cannot go backward and `unpermute` hands its input
back, and weights get a gradient only where rows do.
"""

from __future__ import annotations

import torch

GARBAGE = float("nan")


def rows_of(source, positions, count: int):
    """A buffer of `count` rows, garbage but for the first ones."""
    if len(positions) > count:
        raise IndexError(f"{len(positions)} rows are written into a buffer of {count}")
    buffer = source.new_full((count, *source.shape[1:]), GARBAGE)
    buffer[: len(positions)] = source[positions]
    return buffer


class Permute(torch.autograd.Function):
    """tokens [T, H], map [T, E], probs [T, E] -> rows [count, H] sorted by expert, their weights, where they are."""

    @staticmethod
    def forward(ctx, tokens, routing_map, count, probs):
        if not tokens.numel():
            ctx.probs = probs
            return tokens, torch.tensor([]), torch.tensor([])
        experts, places = routing_map.t().nonzero().unbind(1)
        ctx.save_for_backward(experts, places)
        ctx.shapes = tokens.shape, routing_map.shape
        rows = rows_of(tokens, places, int(count))
        where = torch.stack([experts, places], 1)
        ctx.mark_non_differentiable(where)
        weights = None
        if probs is not None:
            weights = probs.new_full((int(count),), GARBAGE)
            weights[: len(places)] = probs[places, experts]
        return rows, where, weights

    @staticmethod
    def backward(ctx, grad_rows, _, grad_weights):
        if not grad_rows.numel():
            return grad_rows, None, None, ctx.probs  # only there if there were no tokens
        experts, places = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_tokens = grad_rows.new_zeros(ctx.shapes[0]).index_add(0, places, grad_rows[: len(places)])
        if not ctx.needs_input_grad[3]:
            return grad_tokens, None, None, None
        grad_probs = grad_weights.new_zeros(ctx.shapes[1])
        grad_probs[places, experts] = grad_weights[: len(places)]
        return grad_tokens, None, None, grad_probs


class Unpermute(torch.autograd.Function):
    """Rows [R, H] added up where they came from."""

    @staticmethod
    def forward(ctx, rows, where, shape):
        if not rows.numel():
            return rows
        ctx.save_for_backward(where)
        ctx.count = len(rows)
        return rows.new_zeros(shape).index_add(0, where[:, 1], rows[: len(where)])

    @staticmethod
    def backward(ctx, grad):
        if not grad.numel():
            return grad, None, None
        (where,) = ctx.saved_tensors
        return rows_of(grad, where[:, 1], ctx.count), None, None


class SortChunks(torch.autograd.Function):
    """Chunks of rows (and of their weights) in another order; rows beyond the chunks are garbage."""

    @staticmethod
    def forward(ctx, rows, sizes, order, weights):
        if not rows.numel():
            return rows, weights
        assert len(sizes) == len(order)
        chunks = torch.arange(int(sizes.sum())).split(sizes.tolist())
        ctx.places = torch.cat([chunks[i] for i in order.tolist()])
        ctx.count = len(rows)
        sorted_weights = None if weights is None else rows_of(weights, ctx.places, ctx.count)
        return rows_of(rows, ctx.places, ctx.count), sorted_weights

    @staticmethod
    def backward(ctx, grad_rows, grad_weights):
        if not grad_rows.numel():
            return grad_rows, None, None, grad_weights
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        back = torch.empty_like(ctx.places)
        back[ctx.places] = torch.arange(len(back))
        grads = [
            None if grad is None else rows_of(grad, back, ctx.count) for grad in (grad_rows, grad_weights)
        ]
        return grads[0], None, None, grads[1] if ctx.needs_input_grad[3] else None


class FusedKernels:
    """The functions as Megatron imports them; `install` puts them in its place for a test.

    Attributes:
        allocated: rows of every buffer that a permute was asked for.
    """

    def __init__(self):
        self.allocated: list[int] = []

    def permute_with_probs(self, tokens, probs, routing_map, num_out_tokens=-1):
        self.allocated.append(int(num_out_tokens))
        rows, where, weights = Permute.apply(tokens, routing_map, num_out_tokens, probs)
        return rows, weights, where

    def permute(self, tokens, routing_map, num_out_tokens=-1):
        self.allocated.append(int(num_out_tokens))
        rows, where, _ = Permute.apply(tokens, routing_map, num_out_tokens, None)
        return rows, where

    def unpermute(self, rows, where, merging_probs=None, restore_shape=None):
        assert merging_probs is None
        return Unpermute.apply(rows, where, restore_shape)

    def sort_chunks_by_index(self, rows, split_sizes, order):
        return SortChunks.apply(rows, split_sizes, order, None)[0]

    def sort_chunks_by_index_with_probs(self, rows, probs, split_sizes, order):
        return SortChunks.apply(rows, split_sizes, order, probs)

    def install(self, monkeypatch) -> FusedKernels:
        from megatron.core.transformer.moe import moe_utils

        monkeypatch.setattr(moe_utils, "HAVE_TE", True)
        for name in ("permute", "permute_with_probs", "unpermute", "sort_chunks_by_index"):
            monkeypatch.setattr(moe_utils, f"fused_{name}", getattr(self, name))
        name = "sort_chunks_by_index_with_probs"
        monkeypatch.setattr(moe_utils, f"fused_{name}", getattr(self, name))
        return self
