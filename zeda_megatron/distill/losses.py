"""The distillation loss of the last pipeline stage: Megatron's layouts around `ops.vocab_kl`.

Dimensions: S sequence, B batch, H hidden, V rows of the LM head on this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from ..config.run import LossConfig
from ..errors import UserError
from ..ops.vocab_kl import LossInputs, fused_distill_loss


def distill_loss(
    inputs: LossInputs,
    config: LossConfig,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    ahead: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens of mask * loss, and the metric sums of `fused_distill_loss`.

    Hidden states are what the final norm gives, [S, B, H] in Megatron's order; with `sequence_parallel` (and
    a group of several ranks) each rank passes its [S / TP, B, H] part. Labels and weights (floats, 0 = not counted)
    are [B, S], `drawn` too: whole sequences on every rank. With `ahead` the student's state at a place of the row meets
    labels, weights and teacher of the place so many further on; the last places meet nothing.

    The gradient of the hidden states is complete: summed over the group here. The teacher gets none. Loss
    and metrics are the same on every rank of the group: reduce them over data-parallel ranks only.
    Raises UserError if the kind needs a teacher and there is none.
    """
    if config.needs_teacher and inputs.teacher_hidden is None:
        raise UserError(f"loss kind {config.kind!r} needs a teacher: give one, or choose the kind ce")
    teacher_TH = inputs.teacher_hidden
    if teacher_TH is not None:
        with torch.no_grad():
            teacher_SBH = _enter_tp_region(teacher_TH, tp_group, sequence_parallel)
            teacher_TH = (teacher_SBH.roll(-ahead, 0) if ahead else teacher_SBH).flatten(0, 1)
    labels_SB, weights_SB = inputs.labels.t(), inputs.weights.t()
    if ahead:
        labels_SB, weights_SB = labels_SB.roll(-ahead, 0), weights_SB.roll(-ahead, 0)
        weights_SB[-ahead:] = 0.0
    flat = replace(
        inputs,
        hidden=_enter_tp_region(inputs.hidden, tp_group, sequence_parallel).flatten(0, 1),
        labels=labels_SB.flatten(),
        weights=weights_SB.flatten(),
        drawn=None if inputs.drawn is None else inputs.drawn.t().flatten(),
        teacher_hidden=teacher_TH,
    )
    return fused_distill_loss(
        flat,
        kind=config.kind,
        beta=config.beta,
        temperature=config.temperature,
        tp_group=tp_group,
        chunk_tokens=config.chunk_tokens,
        vocab_size=vocab_size,
    )


def _enter_tp_region(
    hidden_SBH: torch.Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool
) -> torch.Tensor:
    """All tokens on every rank; backward sums the ranks' partial gradients (and scatters the sequence)."""
    if tp_group is None or tp_group.size() == 1:
        return hidden_SBH
    # Here, so that one process needs no Megatron for this loss.
    from megatron.core.tensor_parallel import mappings

    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(hidden_SBH, group=tp_group)
    return mappings.copy_to_tensor_model_parallel_region(hidden_SBH, group=tp_group)
