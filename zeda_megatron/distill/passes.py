"""Passes of packed rows through models, and how far a student is from its teacher on them: one for all who ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from ..data.packing import PackedBatch
from ..models.build import has_transformer_engine
from ..ops.vocab_kl import LossInputs
from ..runtime.process_groups import device
from .losses import LossConfig, distill_loss

SUMS = ("weight", "loss", "ce", "teacher_ce", "kl", "top1_agreement")
"""What is summed over response tokens (`ops.vocab_kl`): their weights, the loss, and the metrics."""


def forward_model(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Run one model chunk on one packed row; sequences inside the row do not see each other.

    Returns:
        Hidden states [S, B, H], on the last pipeline stage those that the LM head takes.
    """
    to = partial(torch.Tensor.to, device=device(), non_blocking=True)
    return model(
        to(batch.tokens),
        to(batch.position_ids),
        None,
        packed_seq_params=_packed(batch),
        padding_mask=to(batch.padding_mask),
        return_hidden=True,
    )


def _packed(batch: PackedBatch) -> PackedSeqParams:
    """Where the sequences of a row lie."""
    # Transformer Engine's kernels read them on the device. Without it every layer's attention and rotary embedding
    # read them on the host.
    ends = batch.cu_seqlens.to(device()) if has_transformer_engine() else batch.cu_seqlens
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def draft_states(
    model: torch.nn.Module,
    batch: PackedBatch,
    hidden: torch.Tensor,
    head: torch.nn.Module | None = None,
) -> torch.Tensor:
    """Run the head of multi-token prediction of a bare chunk, or another `head`, on one packed row; `hidden` is what
    `forward_model` gave.

    Returns:
        States [S, B, H] that the LM head takes: at each position t of a sequence for its token t+2.
    """
    to = partial(torch.Tensor.to, device=device(), non_blocking=True)
    hidden = hidden.to(model.head_weight().dtype)  # Megatron's bf16 wrapper hands out fp32
    return model.draft(
        hidden, to(batch.labels), to(batch.position_ids), _packed(batch), to(batch.padding_mask), head
    )


def forward_only(
    model_chunks: list[torch.nn.Module],
    batches: list[PackedBatch],
    seq_length: int,
    forward: Callable[[Any, PackedBatch], torch.Tensor] = forward_model,
) -> list[torch.Tensor]:
    """Run chunks of a pipeline over micro-batches, no gradients. Returns outputs on the last stage, else []."""

    def forward_step(iterator, model):
        return forward(model, next(iterator)), lambda hidden, non_loss_data=False: hidden

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in model_chunks],
            model=model_chunks,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs if parallel_state.is_pipeline_last_stage() else []


def row_loss(
    model: torch.nn.Module,
    batch: PackedBatch,
    hidden: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    config: LossConfig,
    vocab_size: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`distill_loss` of one packed row: sums over its response tokens.

    Args:
        model: the student's last chunk.
        hidden: its last hidden states [S, B, H].
        teacher: the teacher's, and the rows of its LM head.
    """
    head = model.head_weight()
    inputs = LossInputs(
        hidden.to(head.dtype),  # Megatron's bf16 wrapper hands out fp32
        head,
        *(teacher or (None, None)),
        batch.labels.to(hidden.device),
        batch.loss_mask.to(hidden.device),
        None if batch.drawn is None else batch.drawn.to(hidden.device),
    )
    return distill_loss(
        inputs,
        config,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        sequence_parallel=model.config.sequence_parallel,
        vocab_size=vocab_size,
    )


def draft_loss(
    model: torch.nn.Module,
    batch: PackedBatch,
    drafted: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    config: LossConfig,
    vocab_size: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """How far the head of multi-token prediction is from the model whose next choice it is to guess, on one packed row.

    At position t the head says what token t+2 is; the teacher says so at position t+1, and its distribution is what
    drafts are compared with: KL(teacher || head). Without a teacher: cross-entropy on token t+2. Predictions across two
    sequences, of prompts and of padding count nothing. The LM head is a constant.

    Args:
        model: a bare chunk, whose LM head is taken. drafted: `draft_states` of it.
        teacher: hidden states [S, B, H] of the whole row (what `forward_model` gives), and the rows of an LM head.
        config: temperature and chunks; its kind does not matter.

    Returns:
        As `row_loss`: `top1_agreement` is the number of drafts that are the teacher's first choice.
    """
    followed = (batch.position_ids > 0).to(batch.loss_mask.dtype)  # by the head, from the position before
    inputs = LossInputs(
        drafted,
        model.head_weight().detach(),
        *(teacher or (None, None)),
        batch.labels.to(drafted.device),
        (batch.loss_mask * followed).to(drafted.device),
    )
    return distill_loss(
        inputs,
        replace(config, kind="forward_kl" if teacher else "ce"),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        sequence_parallel=model.config.sequence_parallel,
        vocab_size=vocab_size,
        ahead=1,
    )


@dataclass(frozen=True)
class ComparedRow:
    """One row through both models."""

    row: PackedBatch
    """The row."""
    hidden: torch.Tensor
    """The student's last hidden states [S, B, H]."""
    teacher_hidden: torch.Tensor | None
    """The teacher's."""
    sums: dict[str, torch.Tensor]
    """Sums over its response tokens, some of `SUMS` (0-d each)."""


@torch.no_grad()
def compare(
    student: list[torch.nn.Module],
    teacher: Any | None,
    rows: list[PackedBatch],
    seq_length: int,
    loss: LossConfig,
    vocab_size: int,
) -> list[ComparedRow]:
    """Run both models over rows; `total` and `means` of the result are the distance to the teacher.

    Args:
        student: bare chunks of this pipeline rank, in evaluation mode.
        teacher: a `Teacher`; None where `loss` needs none.

    Returns:
        The rows on the last pipeline stage, elsewhere nothing.
    """
    theirs = [None] * len(rows) if teacher is None else teacher.hidden_states(rows, seq_length)
    mine = forward_only(student, rows, seq_length)
    compared = []
    for row, hidden, expected in zip(rows, mine, theirs):  # none before the last stage
        told = None if expected is None else (expected, teacher.head_weight())
        loss_sum, sums = row_loss(student[-1], row, hidden, told, loss, vocab_size)
        compared.append(ComparedRow(row, hidden, expected, {"loss": loss_sum, **sums}))
    return compared


def total(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Add up the sums of rows, one after the other: float64 [len(SUMS)] on the host, in one transfer; 0 for what rows
    do not have."""
    found = torch.zeros(len(SUMS), dtype=torch.float64)
    if rows:
        have = [place for place, name in enumerate(SUMS) if name in rows[0]]
        table = torch.stack([row[SUMS[place]] for row in rows for place in have]).cpu().double()
        for values in table.view(len(rows), len(have)):
            found[have] += values
    return found


def means(sums: torch.Tensor) -> dict[str, float]:
    """Means over response tokens of what `total` gave (after a sum over ranks), and their number `tokens`."""
    tokens, *values = sums.tolist()
    return {name: value / max(tokens, 1.0) for name, value in zip(SUMS[1:], values)} | {"tokens": tokens}
