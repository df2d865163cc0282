"""The expert MLP whose weight gradients go straight into Megatron's float32 `main_grad`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import expert_ops  # noqa: F401  (registers torch.ops.zeda)


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
