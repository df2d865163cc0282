"""The distillation loss of the last pipeline stage: Megatron's layouts around `ops.vocab_kl`.

Dimensions: S sequence, B batch, H hidden, V rows of the LM head on this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from zeda_megatron.errors import UserError
from zeda_megatron.ops.vocab_kl import KINDS, LossInputs, fused_distill_loss


@dataclass(frozen=True)
class LossConfig:
    """Which loss the student gets. Raises UserError for values that make no sense."""

    kind: str = "forward_kl"
    """ce (the labels, as the paper's stage 1), forward_kl (KL(teacher || student)), reverse_kl
    (KL(student || teacher)), sampled_reverse_kl (its policy gradient on labels that the student has sampled, the
    paper's stage 2) or jsd (GKD's mixture of both)."""
    beta: float = 0.5
    """Weight of the teacher in the jsd mixture, between 0 and 1 exclusive."""
    temperature: float = 1.0
    """Divides the logits of both models. The loss is not multiplied by its square."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time: 16 to 20 bytes * chunk_tokens * vocabulary / TP."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"loss kind {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise UserError(
                f"loss beta {self.beta} is out of range: jsd needs a number between 0 and 1 exclusive"
                " (for the ends choose the kinds forward_kl and reverse_kl)"
            )
        if not self.temperature > 0.0:
            raise UserError(f"loss temperature {self.temperature} is out of range: it must be above 0")
        if self.chunk_tokens < 1:
            raise UserError(f"loss chunk_tokens {self.chunk_tokens} is out of range: it must be at least 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether the kind compares with the teacher; "ce" can do without."""
        return self.kind != "ce"


def distill_loss(
    inputs: LossInputs,
    config: LossConfig,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens of mask * loss, and the metric sums of `fused_distill_loss`.

    Hidden states are what the final norm gives, [S, B, H] in Megatron's order; with `sequence_parallel` (and
    a group of several ranks) each rank passes its [S / TP, B, H] part. Labels and weights (floats, 0 = not counted)
    are [B, S]: whole sequences on every rank.

    The gradient of the hidden states is complete: summed over the group here. The teacher gets none. Loss
    and metrics are the same on every rank of the group: reduce them over data-parallel ranks only.
    Raises UserError if the kind needs a teacher and there is none.
    """
    if config.needs_teacher and inputs.teacher_hidden is None:
        raise UserError(f"loss kind {config.kind!r} needs a teacher: give one, or choose the kind ce")
    teacher_TH = inputs.teacher_hidden
    if teacher_TH is not None:
        with torch.no_grad():
            teacher_TH = _enter_tp_region(teacher_TH, tp_group, sequence_parallel).flatten(0, 1)
    flat = replace(
        inputs,
        hidden=_enter_tp_region(inputs.hidden, tp_group, sequence_parallel).flatten(0, 1),
        labels=inputs.labels.t().flatten(),
        weights=inputs.weights.t().flatten(),
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
