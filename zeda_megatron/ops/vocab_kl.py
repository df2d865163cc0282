"""LM head and distillation loss in one operator: no [tokens x vocabulary] tensor ever exists.

The head's GEMM, the loss and its gradient are done for `chunk_tokens` tokens at a time; the forward pass
keeps the finished gradients of the hidden states and of the head, the backward pass scales them. The
vocabulary may be split over a tensor-parallel group: one small all-gather per chunk ("jsd": and one small
all-reduce). `reference_distill_loss` is the same loss the plain way.

Dimensions: T tokens, K tokens with a weight, C tokens of a chunk, H hidden, V columns of this rank,
X values per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from zeda_megatron.ops.vocab_chunk import LossPlan, chunk_loss, importance
from zeda_megatron.ops.vocab_scores import compute_dtype

from ..config.run import LOSS_KINDS


@dataclass(frozen=True)
class LossInputs:
    """The tensors of one loss. Here hidden states are [T, H], labels and weights [T]; `distill.losses` takes Megatron's
    layouts of them."""

    hidden: torch.Tensor
    """The student's last hidden states: all tokens, the same on every rank of the group."""
    weight_VH: torch.Tensor
    """This rank's rows of its LM head; one dtype with `hidden` (float64, float32, bfloat16, float16)."""
    teacher_hidden: torch.Tensor | None
    """The teacher's hidden states, of its own hidden size; never differentiated. None is allowed for kind "ce"."""
    teacher_weight_VH: torch.Tensor | None
    """The teacher's head; with its hidden states or not at all."""
    labels: torch.Tensor
    """int64 global vocabulary ids."""
    weights: torch.Tensor
    """Weight of every token, any sign. Tokens of weight 0 are dropped before any GEMM, so their labels and hidden
    states may hold anything."""
    drawn: torch.Tensor | None = None
    """For "sampled_reverse_kl" with labels of an older student: the log-probability that each was drawn with."""

    def check(self) -> None:
        """Raise ValueError for tensors that do not fit together."""
        if (self.teacher_hidden is None) != (self.teacher_weight_VH is None):
            raise ValueError("give both the teacher's hidden states and its head, or neither")
        tokens = self.hidden.shape[0]
        if self.labels.shape != (tokens,) or self.weights.shape != (tokens,):
            raise ValueError(
                f"{tokens} hidden states, labels {self.labels.shape}, weights {self.weights.shape}"
            )
        if self.drawn is not None and self.drawn.shape != (tokens,):
            raise ValueError(f"{tokens} hidden states, log-probabilities {self.drawn.shape}")
        if self.teacher_hidden is None:
            return
        if self.teacher_hidden.shape[0] != tokens:
            raise ValueError(f"{tokens} student tokens, {self.teacher_hidden.shape[0]} teacher tokens")
        rows, teacher_rows = self.weight_VH.shape[0], self.teacher_weight_VH.shape[0]
        if rows != teacher_rows:
            raise ValueError(f"head rows differ: {rows} student, {teacher_rows} teacher")


def fused_distill_loss(
    inputs: LossInputs,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens of weight * loss, and sums of metrics.

    kind: see the table in `vocab_chunk`; beta belongs to "jsd" alone. "sampled_reverse_kl" expects labels that the
        student has sampled at this temperature.
    temperature: divides both models' logits, for the loss ("ce" included) and the metrics; the loss is not
        multiplied by temperature**2.
    vocab_size: true vocabulary; columns from there on are padding and take no part (default: every column).

    Returns (loss, metrics): a scalar in float32 (float64 for float64 inputs), and without gradient the sums
    "weight", weight * "ce" (label under the student) and, with a teacher, weight * "teacher_ce", "kl"
    (KL(teacher || student)) and "top1_agreement". All are the same on every rank of the group.

    Gradients: weight_VH gets its rows' full gradient. `hidden` gets only THIS RANK'S PART, from its own
    columns: the caller sums it over the group, which Megatron's copy_to_tensor_model_parallel_region and
    gather_from_sequence_parallel_region do in their backward. First derivatives only.
    Raises ValueError for arguments that do not fit together and for a label outside the vocabulary.
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(LOSS_KINDS)}")
    inputs.check()
    if kind != "ce" and inputs.teacher_hidden is None:
        raise ValueError(f"kind {kind!r} needs a teacher")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}: the ends are forward_kl and reverse_kl")
    if temperature <= 0.0 or chunk_tokens < 1:
        raise ValueError(f"temperature ({temperature}) and chunk_tokens ({chunk_tokens}) must be positive")

    ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    columns = inputs.weight_VH.shape[0]
    if vocab_size is not None and vocab_size > columns * ranks:
        raise ValueError(f"vocab_size {vocab_size} exceeds the {columns * ranks} rows of the head")
    plan = LossPlan(
        kind=kind,
        beta=beta,
        temperature=temperature,
        tp_group=tp_group,
        rank=rank,
        rank_columns=columns,
        vocab_size=columns * ranks if vocab_size is None else vocab_size,
        chunk_tokens=chunk_tokens,
        with_grad=torch.is_grad_enabled(),
    )
    loss, sums = _FusedDistillLoss.apply(
        inputs.hidden,
        inputs.weight_VH,
        inputs.teacher_hidden,
        inputs.teacher_weight_VH,
        inputs.labels,
        inputs.weights,
        inputs.drawn if kind == "sampled_reverse_kl" else None,
        plan,
    )
    names = ("ce",) if inputs.teacher_hidden is None else ("ce", "teacher_ce", "kl", "top1_agreement")
    return loss, dict(zip(("weight", *names), sums.unbind()))


class _FusedDistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TH, weight_VH, teacher_hidden_TH, teacher_weight_VH, labels_T, weights_T, drawn_T, plan
    ):
        dtype = compute_dtype(hidden_TH.dtype)
        kept_K = weights_T.nonzero().squeeze(1)
        labels_K, weights_K = labels_T[kept_K], weights_T[kept_K].to(dtype)
        outside_K = (labels_K < 0) | (labels_K >= plan.vocab_size)
        if outside_K.any():
            worst = labels_K[outside_K][0].item()
            raise ValueError(f"label {worst} (weight not 0) lies outside the vocabulary of {plan.vocab_size}")

        # Padding is cut off rather than masked: no column ever holds an infinity.
        head_VH = weight_VH[: plan.true_columns]
        teacher_head_VH = None if teacher_weight_VH is None else teacher_weight_VH[: plan.true_columns]
        grad_hidden_TH = grad_weight_VH = None
        if plan.with_grad and ctx.needs_input_grad[0]:
            grad_hidden_TH = torch.zeros_like(hidden_TH)
        if plan.with_grad and ctx.needs_input_grad[1]:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype)
        want_grad = grad_hidden_TH is not None or grad_weight_VH is not None

        values_XK = []
        drawn = repeat(None) if drawn_T is None else drawn_T[kept_K].to(dtype).split(plan.chunk_tokens)
        for kept_C, labels_C, weights_C, drawn_C in zip(
            *(tensor.split(plan.chunk_tokens) for tensor in (kept_K, labels_K, weights_K)), drawn
        ):
            hidden_CH = hidden_TH[kept_C]
            teacher = None if teacher_head_VH is None else (teacher_hidden_TH[kept_C], teacher_head_VH)
            values_XC, dlogits_CV = chunk_loss(
                hidden_CH, head_VH, teacher, labels_C, plan, want_grad, drawn_C
            )
            values_XK.append(values_XC)
            if not want_grad:
                continue
            dlogits_CV = dlogits_CV.mul_((weights_C / plan.temperature)[:, None]).to(hidden_CH.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[kept_C] = dlogits_CV @ head_VH
            if grad_weight_VH is not None:
                _add_outer(grad_weight_VH[: plan.true_columns], dlogits_CV, hidden_CH)
            del dlogits_CV  # or it would live through the next chunk

        # One sum over all tokens, not a sum of chunk sums: the chunk size leaves no trace in it.
        loss, *sums = (torch.cat(values_XK, dim=1) * weights_K).sum(dim=1).unbind()
        metrics = torch.stack([weights_K.sum(), *sums])
        ctx.save_for_backward(grad_hidden_TH, grad_weight_VH)
        ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(metrics)
        return loss.clone(), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_metrics):
        # New tensors: Megatron's region functions all-reduce in place what they receive.
        grad_hidden_TH, grad_weight_VH = ctx.saved_tensors
        if grad_hidden_TH is not None:
            grad_hidden_TH = grad_hidden_TH * grad_loss
        if grad_weight_VH is not None:
            scaled_VH = torch.empty_like(grad_weight_VH, dtype=ctx.weight_dtype)
            grad_weight_VH = torch.mul(grad_weight_VH, grad_loss, out=scaled_VH)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None, None


def _add_outer(total_VH, dlogits_CV, hidden_CH):
    """total += dlogits^T @ hidden: accumulated in the dtype of `total`, multiplied in that of the inputs."""
    if total_VH.dtype == hidden_CH.dtype:
        total_VH.addmm_(dlogits_CV.t(), hidden_CH)
    else:
        total_VH.add_(dlogits_CV.t() @ hidden_CH)


def reference_distill_loss(
    inputs: LossInputs,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same loss and metrics with full logits and plain autograd: one process, whole heads."""
    dtype = compute_dtype(inputs.hidden.dtype)
    labels_T = inputs.labels.masked_fill(inputs.weights == 0, 0)
    weights_T = inputs.weights.to(dtype)
    logits_TV = (inputs.hidden @ inputs.weight_VH[:vocab_size].t()).to(dtype)
    log_p_TV, log_q_TV = F.log_softmax(logits_TV / temperature, dim=-1), None
    if inputs.teacher_hidden is not None:
        with torch.no_grad():
            logits_TV = (inputs.teacher_hidden @ inputs.teacher_weight_VH[:vocab_size].t()).to(dtype)
            log_q_TV = F.log_softmax(logits_TV / temperature, dim=-1)
    values = token_metrics(log_p_TV, log_q_TV, labels_T)
    loss_T = ce_T = values["ce"]
    if log_q_TV is not None:
        if kind == "forward_kl":
            loss_T = values["kl"]
        elif kind == "reverse_kl":
            loss_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=1)
        elif kind == "sampled_reverse_kl":
            value_T = (values["teacher_ce"] - ce_T).detach()
            if inputs.drawn is not None:
                value_T = value_T * importance(-ce_T.detach(), inputs.drawn.to(dtype))
            surrogate_T = -value_T * ce_T  # -A * log p(label) with A a constant
            loss_T = value_T + (surrogate_T - surrogate_T.detach())
        elif kind == "jsd":
            log_m_TV = (beta * log_q_TV.exp() + (1 - beta) * log_p_TV.exp()).log()
            to_teacher_T = (log_q_TV.exp() * (log_q_TV - log_m_TV)).sum(dim=1)
            to_student_T = (log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(dim=1)
            loss_T = beta * to_teacher_T + (1 - beta) * to_student_T
    values = {"weight": torch.ones_like(ce_T), **values}
    metrics = {name: (weights_T * value_T).sum().detach() for name, value_T in values.items()}
    return (weights_T * loss_T).sum(), metrics


def token_metrics(
    log_p_TV: torch.Tensor, log_q_TV: torch.Tensor | None, labels_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far a model (p) is from the labels and from another (q), per token, from whole distributions: `ce`, and with
    the other `teacher_ce`, `kl` (KL(q || p)) and `top1_agreement` (0 or 1), [T] each, in nats."""
    values = {"ce": -log_p_TV.gather(1, labels_T[:, None]).squeeze(1)}
    if log_q_TV is not None:
        values["teacher_ce"] = -log_q_TV.gather(1, labels_T[:, None]).squeeze(1)
        values["kl"] = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(dim=1)
        values["top1_agreement"] = (log_p_TV.argmax(dim=1) == log_q_TV.argmax(dim=1)).to(log_p_TV.dtype)
    return values
