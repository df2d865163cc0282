"""`torch.ops.zeda`: the operators of an expert layer over rows sorted by expert, and their gradients.

Each has a CPU implementation (`reference`), a CUDA one (`cuda_kernels`), shapes for fake tensors, and a gradient where
one makes sense. `ends` is always the int32 device tensor of inclusive group ends: no operator reads it on the host of
a GPU. Importing this file registers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_kernels, expert_mlp, reference

SCHEMAS = {
    "grouped_mm": "(Tensor x, Tensor[] weights, Tensor ends) -> Tensor",
    "grouped_dgrad": "(Tensor dy, Tensor[] weights, Tensor ends) -> Tensor",
    "grouped_wgrad": "(Tensor dy, Tensor x, Tensor ends) -> Tensor",
    "grouped_wgrad_": "(Tensor(a!)[] outputs, Tensor dy, Tensor x, Tensor ends, bool accumulate) -> ()",
    "swiglu": "(Tensor pre, Tensor? probs, Tensor ends) -> Tensor",
    "swiglu_backward": "(Tensor dact, Tensor pre, Tensor? probs, Tensor ends) -> (Tensor, Tensor, Tensor)",
    "swiglu_dgrad": "(Tensor dout, Tensor[] weights, Tensor pre, Tensor? probs, Tensor ends)"
    " -> (Tensor, Tensor, Tensor)",
    "moe_fc1": "(Tensor x, Tensor[] weights, Tensor? probs, Tensor ends) -> (Tensor, Tensor)",
    "expert_mlp": "(Tensor x, Tensor probs, Tensor ends, Tensor[] fc1, Tensor[] fc2) -> (Tensor, Tensor)",
    "expert_mlp_forward": "(Tensor x, Tensor probs, Tensor ends, Tensor[] fc1, Tensor[] fc2) -> Tensor",
    "expert_mlp_backward": "(Tensor dout, Tensor x, Tensor pre, Tensor probs, Tensor ends, Tensor[] fc1, Tensor[] fc2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "expert_mlp_backward_": "(Tensor dout, Tensor x, Tensor pre, Tensor probs, Tensor ends, Tensor[] fc1, "
    "Tensor[] fc2, Tensor(a!)[] main_fc1, Tensor(b!)[] main_fc2) -> (Tensor, Tensor)",
}
"""Meaning of each: the function of that name in `reference` or `expert_mlp`."""
COMPOSED = {name for name in SCHEMAS if hasattr(expert_mlp, name)}


def _implementations(library: torch.library.Library) -> None:
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        for key, rows in (("CPU", reference), ("CUDA", cuda_kernels)):
            if name in COMPOSED:
                library.impl(name, expert_mlp.over(rows, name), key)
            else:
                library.impl(name, getattr(rows, name), key)


def _fakes(library: torch.library.Library) -> None:
    def rows(x: Tensor, width: int) -> Tensor:
        return x.new_empty(x.shape[0], width)

    def wide(x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(shape, dtype=reference.wide(x.dtype))

    def swiglu_backward(dact, pre, probs, ends):
        return torch.empty_like(pre), rows(pre, pre.shape[1] // 2), wide(pre, pre.shape[0])

    def expert_mlp_backward(dout, x, pre, probs, ends, fc1, fc2):
        shapes = ((len(weights), *weights[0].shape) for weights in (fc1, fc2))
        return torch.empty_like(x), wide(x, x.shape[0]), *(wide(x, *shape) for shape in shapes)

    fakes = {
        "grouped_mm": lambda x, weights, ends: rows(x, weights[0].shape[0]),
        "grouped_dgrad": lambda dy, weights, ends: rows(dy, weights[0].shape[1]),
        "grouped_wgrad": lambda dy, x, ends: wide(x, ends.shape[0], dy.shape[1], x.shape[1]),
        "grouped_wgrad_": lambda outputs, dy, x, ends, accumulate: None,
        "swiglu": lambda pre, probs, ends: rows(pre, pre.shape[1] // 2),
        "swiglu_backward": swiglu_backward,
        "swiglu_dgrad": lambda dout, weights, pre, probs, ends: swiglu_backward(None, pre, probs, ends),
        "moe_fc1": lambda x, weights, probs, ends: (
            rows(x, weights[0].shape[0]),
            rows(x, weights[0].shape[0] // 2),
        ),
        "expert_mlp": lambda x, probs, ends, fc1, fc2: (rows(x, fc2[0].shape[0]), rows(x, fc1[0].shape[0])),
        "expert_mlp_forward": lambda x, probs, ends, fc1, fc2: rows(x, fc2[0].shape[0]),
        "expert_mlp_backward": expert_mlp_backward,
        "expert_mlp_backward_": lambda dout, x, pre, probs, ends, fc1, fc2, main_fc1, main_fc2: (
            torch.empty_like(x),
            wide(x, x.shape[0]),
        ),
    }
    for name in SCHEMAS:
        torch.library.register_fake(f"zeda::{name}", fakes[name], lib=library)


def _split(stacked: Tensor, like: list[Tensor]) -> list[Tensor]:
    """[E, N, K] -> one gradient an expert, in the expert's type."""
    return list(stacked.to(like[0].dtype).unbind(0))


def _gradients(library: torch.library.Library) -> None:
    ops = torch.ops.zeda

    def save_linear(ctx, inputs, output):
        x, weights, ends = inputs
        ctx.save_for_backward(x, ends, *weights)

    def grouped_mm(ctx, dy):
        x, ends, *weights = ctx.saved_tensors
        dx = ops.grouped_dgrad(dy, weights, ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1]):
            return dx, [None] * len(weights), None
        return dx, _split(ops.grouped_wgrad(dy, x, ends), weights), None

    def save_swiglu(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def swiglu(ctx, dact):
        pre, probs, ends = ctx.saved_tensors
        dpre, _, dprobs = ops.swiglu_backward(dact, pre, probs, ends)
        return dpre, None if probs is None else dprobs.to(probs.dtype), None

    def save_fc1(ctx, inputs, output):
        x, weights, probs, ends = inputs
        ctx.save_for_backward(x, probs, ends, output[0], *weights)

    def moe_fc1(ctx, dpre, dact):
        x, probs, ends, pre, *weights = ctx.saved_tensors
        own, _, dprobs = ops.swiglu_backward(dact, pre, probs, ends)
        dpre = own + dpre
        dx = ops.grouped_dgrad(dpre, weights, ends)
        dweights = _split(ops.grouped_wgrad(dpre, x, ends), weights)
        return dx, dweights, None if probs is None else dprobs.to(probs.dtype), None

    def save_mlp(ctx, inputs, output):
        x, probs, ends, fc1, fc2 = inputs
        ctx.experts = len(fc1)
        ctx.save_for_backward(x, output[1], probs, ends, *fc1, *fc2)
        ctx.mark_non_differentiable(output[1])

    def mlp(ctx, dout, _pre):
        x, pre, probs, ends, *weights = ctx.saved_tensors
        fc1, fc2 = weights[: ctx.experts], weights[ctx.experts :]
        if not any((*ctx.needs_input_grad[3], *ctx.needs_input_grad[4])):  # the experts are frozen
            dx, dprobs = ops.expert_mlp_backward_(dout, x, pre, probs, ends, fc1, fc2, [], [])
            none = [None] * ctx.experts
            return dx, dprobs.to(probs.dtype), None, none, none
        dx, dprobs, dfc1, dfc2 = ops.expert_mlp_backward(dout, x, pre, probs, ends, fc1, fc2)
        return dx, dprobs.to(probs.dtype), None, _split(dfc1, fc1), _split(dfc2, fc2)

    for name, backward, setup in (
        ("grouped_mm", grouped_mm, save_linear),
        ("swiglu", swiglu, save_swiglu),
        ("moe_fc1", moe_fc1, save_fc1),
        ("expert_mlp", mlp, save_mlp),
    ):
        torch.library.register_autograd(f"zeda::{name}", backward, setup_context=setup, lib=library)


LIBRARY = torch.library.Library("zeda", "DEF")
"""Owns the registrations: they live as long as it."""
_implementations(LIBRARY)
_fakes(LIBRARY)
_gradients(LIBRARY)
