"""Loss and gradient of one chunk of tokens, from this rank's columns of the vocabulary.

With p the student's and q the teacher's distribution at the given temperature, and z the student's logits
divided by it:

    kind                  loss of a token                          gradient in z
    ce                    -log p[label]                            p - onehot(label)
    forward_kl            KL(q || p)                               p - q
    reverse_kl            KL(p || q)                               p * (log p - log q - KL(p || q))
    sampled_reverse_kl    -A with A = log q[label] - log p[label]  -A * (onehot(label) - p)
    jsd                   beta KL(q || M) + (1-beta) KL(p || M)    (1-beta) p * (log p - log M - KL(p || M))
                          with M = beta q + (1-beta) p

"sampled_reverse_kl" is the token-level policy gradient of the paper's stage 2 (arXiv 2605.18643), for labels that
the student has sampled: the advantage A carries no gradient, so value and gradient are not those of one function.
Over labels drawn from p, their means are the value and the gradient of "reverse_kl". Labels of an older student, drawn
with probability m, count p[label] / m times, `MOST_IMPORTANT` times at most (truncated importance sampling: no label
outweighs all others). "jsd" is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

Dimensions: C tokens of the chunk, H hidden, V columns of this rank, R ranks, P numbers of a rank per token,
X values reported per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zeda_megatron.ops.vocab_scores import STATISTICS, JoinedScores, all_gather, label_columns, local_scores

MOST_IMPORTANT = 2.0
"""No label of an older student counts more often than this."""


@dataclass(frozen=True)
class LossPlan:
    """Everything about a call that is not a tensor."""

    kind: str
    beta: float
    temperature: float
    tp_group: dist.ProcessGroup | None
    rank: int
    rank_columns: int
    vocab_size: int
    chunk_tokens: int
    with_grad: bool

    @property
    def first_column(self) -> int:
        return self.rank * self.rank_columns

    @property
    def true_columns(self) -> int:
        """Columns of this rank that are not padding."""
        return min(max(self.vocab_size - self.first_column, 0), self.rank_columns)


def chunk_loss(
    hidden_CH: torch.Tensor,
    head_VH: torch.Tensor,
    teacher_inputs: tuple[torch.Tensor, torch.Tensor] | None,
    labels_C: torch.Tensor,
    plan: LossPlan,
    want_grad: bool,
    drawn_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """values_XC and d loss / d z [C, V] (None without `want_grad`), both in `compute_dtype`.

    `drawn_C` are the log-probabilities that an older student drew the labels with ("sampled_reverse_kl").
    `teacher_inputs` is None or (hidden_CH, head_VH); head rows are this rank's without padding. The values
    are the rows loss, ce and, with a teacher, teacher_ce, KL(teacher || student), top-1 agreement: the same
    on every rank.
    """
    owner_C = labels_C // plan.rank_columns
    place = (labels_C, plan.first_column, plan.temperature)
    shifted_CV, p_CV, parts = local_scores(hidden_CH, head_VH, *place)
    if teacher_inputs is None:
        student = JoinedScores.join(all_gather(parts, plan.tp_group), owner_C)
        dlogits_CV = _ce_gradient(p_CV, student, labels_C, plan) if want_grad else None
        return torch.stack([student.ce_C, student.ce_C]), dlogits_CV

    teacher_shifted_CV, q_CV, teacher_parts = local_scores(*teacher_inputs, *place)
    # All kinds need the two models' scores only through their difference; in place, to save a [C, V] tensor.
    ratio_CV = shifted_CV.sub_(teacher_shifted_CV)
    del shifted_CV, teacher_shifted_CV
    gaps = [-(q_CV * ratio_CV).sum(dim=1)]
    if plan.kind == "reverse_kl":
        gaps.append((p_CV * ratio_CV).sum(dim=1))
    gathered_RPC = all_gather(torch.cat([parts, teacher_parts, torch.stack(gaps)]), plan.tp_group)
    student = JoinedScores.join(gathered_RPC[:, :STATISTICS], owner_C)
    teacher = JoinedScores.join(gathered_RPC[:, STATISTICS : 2 * STATISTICS], owner_C)
    gaps_RGC = gathered_RPC[:, 2 * STATISTICS :]
    kl_C = teacher.kl_to(student, gaps_RGC[:, 0])
    agree_C = (student.argmax_C == teacher.argmax_C).to(kl_C.dtype)
    shift_C, teacher_shift_C = student.shift_RC[plan.rank], teacher.shift_RC[plan.rank]

    dlogits_CV = None
    if plan.kind == "ce":
        loss_C = student.ce_C
        if want_grad:
            dlogits_CV = _ce_gradient(p_CV, student, labels_C, plan)
    elif plan.kind == "forward_kl":
        loss_C = kl_C
        if want_grad:
            dlogits_CV = p_CV.mul_(shift_C.exp()[:, None]).sub_(q_CV.mul_(teacher_shift_C.exp()[:, None]))
    elif plan.kind == "reverse_kl":
        loss_C = student.kl_to(teacher, gaps_RGC[:, 1])
        if want_grad:
            p_CV.mul_(shift_C.exp()[:, None])
            dlogits_CV = ratio_CV.add_((shift_C - teacher_shift_C - loss_C)[:, None]).mul_(p_CV)
    elif plan.kind == "sampled_reverse_kl":
        loss_C = teacher.ce_C - student.ce_C
        if drawn_C is not None:
            loss_C = loss_C * importance(-student.ce_C, drawn_C)
        if want_grad:
            dlogits_CV = _ce_gradient(p_CV, student, labels_C, plan).mul_(-loss_C[:, None])
    else:
        p_CV.mul_(shift_C.exp()[:, None])
        q_CV.mul_(teacher_shift_C.exp()[:, None])
        loss_C, dlogits_CV = _jsd(p_CV, q_CV, ratio_CV.add_((shift_C - teacher_shift_C)[:, None]), plan)
    return torch.stack([loss_C, student.ce_C, teacher.ce_C, kl_C, agree_C]), dlogits_CV


def importance(logp_T: torch.Tensor, drawn_T: torch.Tensor) -> torch.Tensor:
    """How often a label counts that was drawn with another log-probability than it has now."""
    return (logp_T - drawn_T).exp().clamp(max=MOST_IMPORTANT)


def _ce_gradient(exp_CV, student, labels_C, plan):
    """p - onehot(label), in the memory of `exp_CV`."""
    dlogits_CV = exp_CV.mul_(student.shift_RC[plan.rank].exp()[:, None])
    if dlogits_CV.shape[1]:
        index_C, inside_C = label_columns(labels_C, plan.first_column, dlogits_CV.shape[1])
        rows_C = torch.arange(len(labels_C), device=labels_C.device)
        dlogits_CV[rows_C, index_C] -= inside_C.to(dlogits_CV.dtype)
    return dlogits_CV


def _jsd(p_CV, q_CV, ratio_CV, plan):
    """Loss per token and its gradient, from ratio = log(p/q): p/M = 1 / ((1-beta) + beta exp(-ratio))."""
    log_student = ratio_CV.new_tensor(math.log1p(-plan.beta))
    p_over_m_CV = torch.logaddexp(log_student, math.log(plan.beta) - ratio_CV).neg_()
    kl_2C = torch.stack([(p_CV * p_over_m_CV).sum(1), ((p_over_m_CV - ratio_CV).mul_(q_CV)).sum(1)])
    if plan.tp_group is not None and plan.tp_group.size() > 1:
        dist.all_reduce(kl_2C, group=plan.tp_group)
    student_C, teacher_C = kl_2C.unbind()
    dlogits_CV = p_over_m_CV.sub_(student_C[:, None]).mul_(p_CV).mul_(1.0 - plan.beta)
    return plan.beta * teacher_C + (1.0 - plan.beta) * student_C, dlogits_CV
