"""The fused head-and-loss operator against torch's own losses, autograd and finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from zeda_megatron.config.run import LOSS_KINDS
from zeda_megatron.ops.vocab_kl import LossInputs, fused_distill_loss, reference_distill_loss

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, TRUE_VOCAB = 23, 12, 10, 40, 37
BETA, TEMPERATURE = 0.3, 1.7


@dataclass(frozen=True)
class Case:
    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    teacher_hidden_TH: torch.Tensor | None
    teacher_weight_VH: torch.Tensor | None
    labels_T: torch.Tensor
    weights_T: torch.Tensor

    def run(self, operator, **options):
        """(loss, metrics, d hidden, d head) with an upstream factor of 3."""
        hidden_TH = self.hidden_TH.clone().requires_grad_()
        weight_VH = self.weight_VH.clone().requires_grad_()
        teacher = (self.teacher_hidden_TH, self.teacher_weight_VH)
        inputs = LossInputs(hidden_TH, weight_VH, *teacher, self.labels_T, self.weights_T)
        loss, metrics = operator(inputs, **options)
        (3 * loss).backward()
        return loss.detach(), metrics, hidden_TH.grad, weight_VH.grad


def make_case(dtype=torch.float32, tokens=TOKENS, scale=1.0, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    weights_T = torch.rand(tokens, generator=generator)
    return Case(
        normal(tokens, HIDDEN),
        normal(VOCAB, HIDDEN),
        normal(tokens, TEACHER_HIDDEN),
        normal(VOCAB, TEACHER_HIDDEN),
        torch.randint(0, TRUE_VOCAB, (tokens,), generator=generator),
        weights_T.where(weights_T > 0.3, 0.0),
    )


def options(kind, **more):
    return {"kind": kind, "beta": BETA, "temperature": TEMPERATURE, "vocab_size": TRUE_VOCAB, **more}


def torch_loss(inputs: LossInputs, *, kind, **_ignored):
    """The losses spelled with torch.nn.functional: F.kl_div(input, target) is KL(target || input). A policy gradient is
    that of the labels' cross-entropy, weighted by the negative advantage of each."""
    hidden_TH, weight_VH, labels_T = inputs.hidden, inputs.weight_VH, inputs.labels
    teacher_VH = inputs.teacher_weight_VH[:TRUE_VOCAB]
    log_p_TV = F.log_softmax(hidden_TH @ weight_VH[:TRUE_VOCAB].t() / TEMPERATURE, dim=1)
    log_q_TV = F.log_softmax(inputs.teacher_hidden @ teacher_VH.t() / TEMPERATURE, dim=1)
    log_mixture = torch.tensor([1 - BETA, BETA], dtype=log_p_TV.dtype).log()[:, None, None]
    log_m_TV = torch.logsumexp(torch.stack([log_p_TV, log_q_TV]) + log_mixture, dim=0)

    def kl(input_TV, target_TV):
        return F.kl_div(input_TV, target_TV, reduction="none", log_target=True).sum(dim=1)

    def cross_entropy(log_TV):
        return F.nll_loss(log_TV, labels_T, reduction="none")

    def policy_gradient():
        with torch.no_grad():
            advantage_T = cross_entropy(log_p_TV) - cross_entropy(log_q_TV)
        surrogate_T = advantage_T * cross_entropy(log_p_TV)
        return -advantage_T + (surrogate_T - surrogate_T.detach())

    loss_T = {
        "ce": lambda: F.cross_entropy(
            hidden_TH @ weight_VH[:TRUE_VOCAB].t() / TEMPERATURE, labels_T, reduction="none"
        ),
        "sampled_reverse_kl": policy_gradient,
        "forward_kl": lambda: kl(log_p_TV, log_q_TV),
        "reverse_kl": lambda: kl(log_q_TV, log_p_TV),
        "jsd": lambda: BETA * kl(log_m_TV, log_q_TV) + (1 - BETA) * kl(log_m_TV, log_p_TV),
    }[kind]()
    return (loss_T * inputs.weights).sum(), {}


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    for name, a, b in zip(("loss", "d hidden", "d head"), (ours[0], *ours[2:]), (theirs[0], *theirs[2:])):
        tiny.close(a, b, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_loss_and_gradients_equal_torchs_own(operator, kind):
    case = make_case(torch.float64)
    assert_same(case.run(operator, **options(kind)), case.run(torch_loss, kind=kind), 1e-12, 1e-12)
    case = make_case(torch.float32)
    assert_same(case.run(operator, **options(kind)), case.run(torch_loss, kind=kind), 1e-5, 3e-6)


DIFFERENTIABLE = [kind for kind in LOSS_KINDS if kind != "sampled_reverse_kl"]
"""Kinds whose value and gradient are those of one function."""


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_gradients_are_the_finite_differences(kind):
    case = make_case(torch.float64, tokens=5, scale=0.5)

    def loss(hidden_TH, weight_VH):
        teacher = (case.teacher_hidden_TH, case.teacher_weight_VH)
        inputs = LossInputs(hidden_TH, weight_VH, *teacher, case.labels_T, case.weights_T)
        return fused_distill_loss(inputs, **options(kind, chunk_tokens=2))[0]

    assert torch.autograd.gradcheck(
        loss, (case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_())
    )


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_metrics_equal_the_reference(kind):
    case = make_case(torch.float64)
    _, ours, *_ = case.run(fused_distill_loss, **options(kind, chunk_tokens=7))
    _, theirs, *_ = case.run(reference_distill_loss, **options(kind))
    assert set(ours) == {"weight", "ce", "teacher_ce", "kl", "top1_agreement"}
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in ours.values())


def test_cross_entropy_needs_no_teacher():
    case = make_case()
    alone = replace(case, teacher_hidden_TH=None, teacher_weight_VH=None)
    ours = alone.run(fused_distill_loss, **options("ce"))
    assert_same(ours, case.run(fused_distill_loss, **options("ce")), 0, 0)
    assert set(ours[1]) == {"weight", "ce"}


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_chunk_size_leaves_the_result_alone(kind):
    case = make_case(torch.float64)
    whole = case.run(fused_distill_loss, **options(kind, chunk_tokens=1000))
    for chunk_tokens in (1, 4, TOKENS):
        parts = case.run(fused_distill_loss, **options(kind, chunk_tokens=chunk_tokens))
        assert_same(parts, whole, 1e-13, 1e-13)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_masked_tokens_get_zero_gradient_and_may_hold_anything(kind):
    case = make_case()
    masked_T = case.weights_T == 0
    assert 0 < masked_T.sum() < TOKENS
    clean = case.run(fused_distill_loss, **options(kind))
    dirty = replace(
        case,
        hidden_TH=case.hidden_TH.masked_fill(masked_T[:, None], float("nan")),
        teacher_hidden_TH=case.teacher_hidden_TH.masked_fill(masked_T[:, None], float("inf")),
        labels_T=case.labels_T.masked_fill(masked_T, -100),
    ).run(fused_distill_loss, **options(kind))
    assert_same(dirty, clean, 0, 0)
    assert (clean[2][masked_T] == 0).all() and (clean[2][~masked_T] != 0).all()


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_a_batch_without_loss_tokens_is_zero_not_an_error(kind):
    case = replace(make_case(), weights_T=torch.zeros(TOKENS))
    loss, metrics, grad_hidden, grad_weight = case.run(fused_distill_loss, **options(kind))
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert not grad_hidden.any() and not grad_weight.any()


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_padded_columns_take_no_part(kind):
    case = make_case()
    clean = case.run(fused_distill_loss, **options(kind))
    padding_V = (torch.arange(VOCAB) >= TRUE_VOCAB)[:, None]
    loud = replace(
        case,
        weight_VH=case.weight_VH.masked_fill(padding_V, 1e4),
        teacher_weight_VH=case.teacher_weight_VH.masked_fill(padding_V, 1e4),
    ).run(fused_distill_loss, **options(kind))
    assert_same(loud, clean, 0, 0)
    assert not clean[3][TRUE_VOCAB:].any() and (clean[3][:TRUE_VOCAB] != 0).any()


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_bfloat16_stays_near_float64_on_the_same_numbers(kind):
    case = make_case(torch.bfloat16, scale=0.5)
    ours = case.run(fused_distill_loss, **options(kind, chunk_tokens=4))
    exact = Case(*(t.double() if t.is_floating_point() else t for t in vars(case).values()))
    theirs = exact.run(torch_loss, kind=kind)
    assert (ours[0].dtype, ours[2].dtype, ours[3].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    # Log-ratios of samples have both signs and cancel in the sum; divergences do not.
    atol = 1e-3 * float(case.weights_T.sum()) if kind == "sampled_reverse_kl" else 0
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-2, atol=atol)
    for mine, exact_grad in zip(ours[2:], theirs[2:]):
        assert (mine.double() - exact_grad).norm() < 2e-2 * exact_grad.norm()


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_extreme_scores_stay_finite_and_right(kind):
    case = make_case(torch.float64, scale=12.0)
    ours = case.run(fused_distill_loss, **options(kind))
    assert all(torch.isfinite(t).all() for t in (ours[0], *ours[2:]))
    assert_same(ours, case.run(torch_loss, kind=kind), 1e-10, 1e-10)


def test_a_student_equal_to_its_teacher_has_no_divergence():
    case = make_case()
    same = replace(case, teacher_hidden_TH=case.hidden_TH, teacher_weight_VH=case.weight_VH)
    for kind in ("forward_kl", "reverse_kl", "sampled_reverse_kl", "jsd"):
        loss, metrics, grad_hidden, _ = same.run(fused_distill_loss, **options(kind))
        assert abs(loss) < 1e-6 and grad_hidden.abs().max() < 1e-6, kind
        assert metrics["top1_agreement"] == metrics["weight"]


def test_gradients_are_computed_only_where_wanted():
    case = make_case()
    hidden_TH = case.hidden_TH.clone().requires_grad_()
    teacher = (case.teacher_hidden_TH, case.teacher_weight_VH)
    inputs = LossInputs(hidden_TH, case.weight_VH, *teacher, case.labels_T, case.weights_T)
    with torch.no_grad():
        loss, _ = fused_distill_loss(inputs, **options("forward_kl"))
    assert not loss.requires_grad
    loss, _ = fused_distill_loss(inputs, **options("forward_kl"))
    assert loss.grad_fn.saved_tensors[1] is None  # a frozen head costs no gradient buffer
    loss.backward(retain_graph=True)
    once = hidden_TH.grad.clone()
    loss.backward()  # the saved gradients are scaled into new tensors, so a second pass adds the same again
    torch.testing.assert_close(hidden_TH.grad, 2 * once, rtol=0, atol=0)


def test_arguments_that_do_not_fit_are_refused():
    case = make_case()
    for changes, more, message in (
        ({}, {"kind": "kl"}, "forward_kl"),
        ({"teacher_hidden_TH": None, "teacher_weight_VH": None}, {}, "needs a teacher"),
        ({"teacher_hidden_TH": None}, {}, "neither"),
        ({}, {"kind": "jsd", "beta": 1.0}, "beta"),
        ({}, {"temperature": 0.0}, "temperature"),
        ({}, {"vocab_size": VOCAB + 1}, "vocab_size"),
        ({"labels_T": torch.full((TOKENS,), TRUE_VOCAB)}, {}, "outside the vocabulary"),
        ({"labels_T": case.labels_T[:-1]}, {}, "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(case, **changes).run(fused_distill_loss, **(options("forward_kl") | more))
