"""The policy gradient on sampled tokens: reverse KL on average, an advantage without gradient."""

from __future__ import annotations

import math

import pytest
import torch

from zeda_megatron.ops.vocab_kl import LossInputs, fused_distill_loss, reference_distill_loss

TOKENS, HIDDEN, VOCAB, TRUE_VOCAB, TEMPERATURE = 9, 6, 24, 21, 1.4


@pytest.fixture
def case():
    """hidden_TH, head_VH, the teacher's, labels_T, weights_T; two tokens of weight 0."""
    torch.manual_seed(4)
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((TOKENS, HIDDEN), (VOCAB, HIDDEN)) * 2]
    weights_T = torch.rand(TOKENS, dtype=torch.float64) + 0.5
    weights_T[[2, 5]] = 0.0
    return *tensors, torch.randint(0, TRUE_VOCAB, (TOKENS,)), weights_T


def run(operator, kind, hidden_TH, head_VH, *rest, temperature=TEMPERATURE):
    """(loss, d hidden, d head)."""
    hidden_TH, head_VH = (t.clone().requires_grad_() for t in (hidden_TH, head_VH))
    inputs = LossInputs(hidden_TH, head_VH, *rest)
    loss, _ = operator(inputs, kind=kind, temperature=temperature, vocab_size=TRUE_VOCAB)
    return loss.detach(), *torch.autograd.grad(loss, (hidden_TH, head_VH))


def log_probabilities(hidden_TH, head_VH):
    return (hidden_TH @ head_VH[:TRUE_VOCAB].t() / TEMPERATURE).log_softmax(dim=1)


@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_value_and_gradient_are_reverse_kls_on_average_over_the_students_samples(operator, case):
    *tensors, labels_T, weights_T = case
    p_TV = log_probabilities(*tensors[:2]).exp()
    sums = None
    for label in range(TRUE_VOCAB):
        drawn_T = torch.full((TOKENS,), label)
        parts = run(operator, "sampled_reverse_kl", *tensors, drawn_T, weights_T * p_TV[:, label])
        sums = parts if sums is None else [total + part for total, part in zip(sums, parts)]
    exact = run(operator, "reverse_kl", *tensors, labels_T, weights_T)
    for mean, wanted in zip(sums, exact):
        torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-10)
    single = run(operator, "sampled_reverse_kl", *tensors, labels_T, weights_T)
    assert (single[1] - exact[1]).norm() > 0.1 * exact[1].norm()  # one draw is not the mean


@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_over_an_older_students_samples_the_mean_is_the_same_where_no_label_is_cut(operator, case):
    *tensors, labels_T, weights_T = case
    p_TV = log_probabilities(*tensors[:2]).exp()
    older_TV = (p_TV + torch.rand_like(p_TV).softmax(dim=1)) / 2  # nowhere less than half of p
    sums = None
    for label in range(TRUE_VOCAB):
        drawn_T, m_T = torch.full((TOKENS,), label), older_TV[:, label]
        rest = (*tensors, drawn_T, weights_T * m_T, m_T.log())
        parts = run(operator, "sampled_reverse_kl", *rest)
        sums = parts if sums is None else [total + part for total, part in zip(sums, parts)]
    for mean, wanted in zip(sums, run(operator, "reverse_kl", *tensors, labels_T, weights_T)):
        torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_a_label_that_has_become_much_likelier_counts_twice_and_no_more(operator, case):
    hidden_TH, head_VH, *_, labels_T, _ = case
    logp_T = log_probabilities(hidden_TH, head_VH).gather(1, labels_T[:, None]).squeeze(1)
    plain = run(operator, "sampled_reverse_kl", *case)
    for shift in (0.0, 0.5, 3.0, -1.0):
        factor = min(math.exp(shift), 2.0)
        found = run(operator, "sampled_reverse_kl", *case, logp_T - shift)
        for one, other in zip(found, plain):
            torch.testing.assert_close(one, factor * other)


@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_the_advantage_carries_no_gradient(operator, case):
    """Then the gradient is that of half the squared log-ratio, for the teacher is constant."""
    hidden_TH, head_VH, *teacher, labels_T, weights_T = case
    leaves = [t.clone().requires_grad_() for t in (hidden_TH, head_VH)]
    log_p_T, log_q_T = (
        log_probabilities(*pair).gather(1, labels_T[:, None]).squeeze(1) for pair in (leaves, teacher)
    )
    half_square = 0.5 * ((log_p_T - log_q_T).square() * weights_T).sum()
    expected = torch.autograd.grad(half_square, leaves)
    loss, *grads = run(operator, "sampled_reverse_kl", *case)
    torch.testing.assert_close(grads, list(expected), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss, ((log_p_T - log_q_T) * weights_T).sum().detach())


@pytest.mark.parametrize("operator", [fused_distill_loss, reference_distill_loss])
def test_the_temperature_divides_both_models_logits(operator, case):
    hidden_TH, head_VH, teacher_TH, teacher_VH, *targets = case
    warm = run(operator, "sampled_reverse_kl", *case)
    scaled = (hidden_TH, head_VH / TEMPERATURE, teacher_TH, teacher_VH / TEMPERATURE)
    cold = run(operator, "sampled_reverse_kl", *scaled, *targets, temperature=1.0)
    torch.testing.assert_close(warm[:2], cold[:2])
    torch.testing.assert_close(warm[2], cold[2] / TEMPERATURE)  # of the head before its division
    assert not torch.allclose(warm[0], run(operator, "sampled_reverse_kl", *case, temperature=1.0)[0])


def test_a_sample_that_the_teacher_likes_better_is_pushed_up_and_a_worse_one_down(case):
    *tensors, labels_T, _ = case
    log_p_T, log_q_T = (
        log_probabilities(*pair).gather(1, labels_T[:, None]).squeeze(1)
        for pair in (tensors[:2], tensors[2:])
    )
    better_T = log_q_T > log_p_T
    assert 0 < better_T.sum() < TOKENS
    _, grad_TH, _ = run(fused_distill_loss, "sampled_reverse_kl", *tensors, labels_T, torch.ones(TOKENS))
    after_T = log_probabilities(tensors[0] - 1e-4 * grad_TH, tensors[1]).gather(1, labels_T[:, None])
    assert torch.equal(after_T.squeeze(1) > log_p_T, better_T)


def test_masked_samples_have_no_gradient(case):
    grad_TH = run(fused_distill_loss, "sampled_reverse_kl", *case)[1]
    assert not grad_TH[[2, 5]].any() and (grad_TH[[0, 1, 3, 4, 6, 7, 8]].norm(dim=1) > 0).all()
