"""The expert MLP as zeda_megatron calls it; weight gradients go straight into Megatron's float32 `main_grad`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from zeda_megatron.ops.expert_kernels import ExpertKernels

from . import (
    cuda_kernels,
    expert_mlp,
    expert_ops,  # noqa: F401  (registers torch.ops.zeda)
    reference,
)
from .expert_table import ExpertTable, as_table
from .kernel_call import why_not
from .kernel_library import find


def mlp(x: Tensor, probs: Tensor, ends: Tensor, fc1: list[Tensor], fc2: list[Tensor]) -> Tensor:
    """x [R, H], probs [R], ends [E], E fc1 [2F, H], E fc2 [H, F] -> [R, H]. The host reads no ends on a GPU.

    Lists that were made by `ExpertTable` cost less when they come again.
    """
    if torch.compiler.is_compiling():
        return torch.ops.zeda.expert_mlp(x, probs, ends, list(fc1), list(fc2))[0]
    fc1, fc2 = as_table(fc1), as_table(fc2)
    if not torch.is_grad_enabled():
        return expert_mlp.expert_mlp_forward(rows_on(x), x, probs, ends, fc1, fc2)
    (trained1, main1), (trained2, main2) = fc1.trained(), fc2.trained()
    if not (trained1 or trained2):
        if x.requires_grad or probs.requires_grad:
            return ExpertMlp.apply(x, probs, ends, fc1, fc2)
        return expert_mlp.expert_mlp_forward(rows_on(x), x, probs, ends, fc1, fc2)
    if main1 is None or main2 is None:
        return torch.ops.zeda.expert_mlp(x, probs, ends, fc1, fc2)[0]
    return ExpertMlp.apply(x, probs, ends, fc1, fc2, *fc1, *fc2)


def rows_on(x: Tensor) -> ModuleType:
    """Functions over rows for the device of a tensor."""
    return cuda_kernels if x.is_cuda else reference


class ExpertMlp(torch.autograd.Function):
    """`torch.ops.zeda.expert_mlp` with its tables kept, of frozen experts, or of weights (given once more, one by one)
    whose gradients go to `main_grad`, with `grad_added_to_main_grad` set as Megatron's own fused layers set it.

    Such weights still get a gradient, of no particular value: Megatron's hook waits for one, reads the mark, and drops
    it. All weights of a shape share its memory.
    """

    @staticmethod
    def forward(ctx, x, probs, ends, fc1: ExpertTable, fc2: ExpertTable, *weights: Tensor) -> Tensor:
        """x [R, H], probs [R], ends [E] -> [R, H]."""
        out, pre = expert_mlp.expert_mlp(rows_on(x), x, probs, ends, fc1, fc2)
        ctx.tables, ctx.weights = (fc1, fc2), weights  # the parameters: saved tensors lose `main_grad`
        ctx.save_for_backward(x, pre, probs, ends)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, pre, probs, ends = ctx.saved_tensors
        fc1, fc2 = ctx.tables
        main1, main2 = (table.trained()[1] for table in ctx.tables) if ctx.weights else ([], [])
        dx, dprobs = expert_mlp.expert_mlp_backward_(
            rows_on(x), dout, x, pre, probs, ends, fc1, fc2, main1, main2
        )
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = True
        unread = [*_unread(fc1), *_unread(fc2)] if ctx.weights else []
        return dx, dprobs.to(probs.dtype), None, None, None, *unread


def _unread(weights: ExpertTable) -> tuple[Tensor, ...]:
    """A gradient for each weight, all in one weight's memory; each is dense by itself, so that autograd copies none."""
    return torch.empty_like(weights[0]).expand(len(weights), -1, -1).unbind(0)


KERNELS = ExpertKernels(library=find, why_not=why_not, mlp=mlp, keep=ExpertTable)
"""What the entry point gives."""
