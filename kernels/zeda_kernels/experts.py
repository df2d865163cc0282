"""The expert MLP as zeda_megatron calls it; weight gradients go straight into Megatron's float32 `main_grad`."""

from __future__ import annotations

import torch
from torch import Tensor

from zeda_megatron.ops.expert_kernels import ExpertKernels

from . import expert_ops  # noqa: F401  (registers torch.ops.zeda)
from .kernel_call import why_not
from .kernel_library import find


def expert_mlp(x: Tensor, probs: Tensor, ends: Tensor, fc1: list[Tensor], fc2: list[Tensor]) -> Tensor:
    """x [R, H], probs [R], ends [E], E fc1 [2F, H], E fc2 [H, F] -> [R, H]. The host reads no ends on a GPU."""
    weights = [*fc1, *fc2]
    wanted = any(tensor.requires_grad for tensor in (x, probs, *weights))
    if not (wanted and torch.is_grad_enabled()):
        return torch.ops.zeda.expert_mlp_forward(x, probs, ends, fc1, fc2)
    if takes_main_grad(weights):
        return ExpertMlpIntoMainGrad.apply(x, probs, ends, len(fc1), *weights)
    return torch.ops.zeda.expert_mlp(x, probs, ends, fc1, fc2)[0]


def takes_main_grad(weights: list[Tensor]) -> bool:
    """Whether Megatron's data parallelism keeps a float32 buffer for each of these weights that kernels can add to."""
    return all(
        weight.requires_grad
        and hasattr(weight, "grad_added_to_main_grad")
        and getattr(weight, "main_grad", None) is not None
        and weight.main_grad.dtype == torch.float32
        and weight.main_grad.data_ptr() % 16 == 0
        for weight in weights
    )


class ExpertMlpIntoMainGrad(torch.autograd.Function):
    """`torch.ops.zeda.expert_mlp`, with `grad_added_to_main_grad` set as Megatron's own fused layers set it.

    The weights still get a gradient, of no particular value: Megatron's hook waits for one, reads the mark, and drops
    it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, probs: Tensor, ends: Tensor, experts: int, *weights: Tensor) -> Tensor:
        """x [R, H], probs [R], ends [E], then E fc1 and E fc2 weights -> [R, H]."""
        out, pre = torch.ops.zeda.expert_mlp(x, probs, ends, weights[:experts], weights[experts:])
        ctx.experts, ctx.weights = (
            experts,
            weights,
        )  # the parameters themselves: saved tensors lose `main_grad`
        ctx.save_for_backward(x, pre, probs, ends)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, pre, probs, ends = ctx.saved_tensors
        fc1, fc2 = ctx.weights[: ctx.experts], ctx.weights[ctx.experts :]
        main1, main2 = ([weight.main_grad for weight in weights] for weights in (fc1, fc2))
        dx, dprobs = torch.ops.zeda.expert_mlp_backward_(dout, x, pre, probs, ends, fc1, fc2, main1, main2)
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = True
        unread = [torch.empty_like(weight) for weight in ctx.weights]
        return dx, dprobs.to(probs.dtype), None, None, *unread


KERNELS = ExpertKernels(library=find, why_not=why_not, mlp=expert_mlp)
"""What the entry point gives."""
