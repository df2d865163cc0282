"""Hidden states matched: a loss on the residual stream after each layer, beside the one on the answers.

    coefficient / layers * sum over layers of the mean over response tokens of |h - t|^2 / |t|^2

h is the student's stream after a layer, t the teacher's. No extra pass: the teacher keeps what its layers give (L*T*H
numbers a micro-batch, on the stages that have the layers), and every pipeline stage adds the gradient of its own layers
where the stream leaves them. Under sequence parallelism each rank matches its own tokens; nothing is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from ..data.packing import PackedBatch
from ..runtime.process_groups import device
from .teacher import Teacher

SMALLEST = 1e-20
"""Least |t|^2 that is divided by."""


class RelativeError(torch.autograd.Function):
    """`relative_error`; keeps one tensor, its gradient, of the type of the hidden states."""

    @staticmethod
    def forward(ctx, hidden_TH, target_TH, weight_T):
        difference_TH = hidden_TH.float() - target_TH.float()
        weight_T = weight_T.float() / target_TH.float().square().sum(-1).clamp(min=SMALLEST)
        ctx.save_for_backward((2 * weight_T[:, None] * difference_TH).to(hidden_TH.dtype))
        return (weight_T * difference_TH.square().sum(-1)).sum()

    @staticmethod
    def backward(ctx, grad):
        (gradient_TH,) = ctx.saved_tensors
        return (grad * gradient_TH).to(gradient_TH.dtype), None, None


def relative_error(hidden_TH: torch.Tensor, target_TH: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """sum over tokens of weight * |h - t|^2 / |t|^2, a float32 number with a gradient for h alone.

    Args:
        hidden_TH: [T, H] of any floating type. target_TH: [T, H]. weight_T: [T], 0 = not counted.
    """
    return RelativeError.apply(hidden_TH, target_TH, weight_T)


@dataclass
class _Layer:
    """What one layer of this rank still waits for, in the order of the micro-batches."""

    targets: deque[torch.Tensor] = field(default_factory=deque)
    """What the teacher's layer gave."""
    weights: deque[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=deque)
    """Per micro-batch: weights of the tokens, and what their sum is multiplied by."""
    again: deque[tuple] = field(default_factory=deque)
    """Those of passes that will be recomputed: target, weights, factor."""

    def following(self) -> tuple:
        """Target, weights and factor of the next micro-batch."""
        return self.targets.popleft(), *self.weights.popleft()

    def waiting(self) -> int:
        return len(self.targets) + len(self.weights) + len(self.again)


class HiddenMatch:
    """Hooks on all layers of this rank's chunks of teacher and student; at work within `step` alone.

    Args:
        student: bare chunks of this pipeline rank.
        teacher: of the same layers; in the memory mode `offload` what it keeps waits on the host too.
        coeff: --hidden-loss-coeff.
    """

    def __init__(self, student: list[torch.nn.Module], teacher: Teacher, coeff: float):
        self._teacher, self._layers = teacher, []
        self._active, self._error = False, None
        config = student[0].config
        # Megatron multiplies losses that are attached on the way by the context-parallel size.
        self._factor = coeff / config.num_layers / config.context_parallel_size
        for mine, theirs in zip(student, teacher.model_chunks, strict=True):
            for layer, other in zip(mine.decoder.layers, theirs.decoder.layers, strict=True):
                kept = _Layer()
                self._layers.append(kept)
                other.register_forward_hook(lambda _m, _a, out, kept=kept: self._keep(kept, out[0]))
                layer.register_forward_hook(lambda m, _a, out, kept=kept: self._match(kept, m, out))

    @contextmanager
    def step(self, batches: list[PackedBatch], scales: list[torch.Tensor]) -> Iterator[None]:
        """Match the micro-batches that both models run meanwhile.

        Args:
            scales: what each one's sum over tokens is multiplied by (0-d), as that of the loss on its answers.
        """
        mine = [(_local(batch.loss_mask), scale * self._factor) for batch, scale in zip(batches, scales)]
        for layer in self._layers:
            layer.weights.extend(mine)
        self._active, self._error = True, torch.zeros((), device=device())
        try:
            yield
            waiting = sum(layer.waiting() for layer in self._layers)
            if waiting:
                raise RuntimeError(f"{waiting} hidden states of the teacher were never met by the student")
        finally:
            self._active = False
            for layer in self._layers:
                for queue in (layer.targets, layer.weights, layer.again):
                    queue.clear()

    def error_sum(self) -> torch.Tensor:
        """Of the last step on this rank: sum over its layers and tokens of the relative error, over L (0-d)."""
        return self._error

    def _keep(self, kept: _Layer, hidden_SBH: torch.Tensor) -> None:
        if self._active and self._teacher.running:
            hidden_SBH = hidden_SBH.detach()
            kept.targets.append(hidden_SBH.cpu() if self._teacher.mode == "offload" else hidden_SBH)

    def _match(self, kept: _Layer, layer: torch.nn.Module, output: tuple):
        """Forward hook: the layer's output, with the loss attached; its gradient comes in the backward pass."""
        if not self._active or self._teacher.running or not layer.training:
            return None
        if not torch.is_grad_enabled():  # the first pass of a recomputed block
            kept.again.append(kept.following())
            return None
        target_SBH, weight_T, factor = kept.again.popleft() if kept.again else kept.following()
        hidden_SBH = output[0]
        target_TH = target_SBH.to(hidden_SBH.device, non_blocking=True).flatten(0, 1)
        error = relative_error(hidden_SBH.flatten(0, 1), target_TH, weight_T)
        self._error += error.detach() / layer.config.num_layers
        return MoEAuxLossAutoScaler.apply(hidden_SBH, error * factor), *output[1:]


def _local(mask_BS: torch.Tensor) -> torch.Tensor:
    """Weights of this rank's tokens [T] in the order of the hidden states [S, B]."""
    mask_SB = mask_BS.t()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks > 1:
        mask_SB = mask_SB.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    return mask_SB.flatten().to(device())
