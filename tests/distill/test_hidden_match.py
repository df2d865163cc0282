"""Hidden states matched in a training step: the gradient is that of a plain sum over layers, whatever the schedule."""

import pytest
import tiny_world
import torch

from zeda_megatron.distill.hidden_match import SMALLEST, relative_error
from zeda_megatron.distill.passes import forward_model, row_loss
from zeda_megatron.errors import UserError

COEFF = 5.0


def reference_relative_error(hidden_TH, target_TH, weight_T) -> torch.Tensor:
    """The definition, gradient by autograd."""
    target_TH = target_TH.detach().float()
    error_T = (hidden_TH.float() - target_TH).square().sum(-1)
    return (weight_T * error_T / target_TH.square().sum(-1).clamp(min=SMALLEST)).sum()


@pytest.fixture
def rows(one_process, world):
    """Two packed rows of other numbers of response tokens."""

    def make(**flags):
        return tiny_world.run_on_pairs(world, 64, "tp_cp", **flags)

    return make


def gradients(run) -> dict[str, torch.Tensor]:
    """Of what trains; Megatron adds them up here."""
    named = run.student.chunks[0].named_parameters()
    return {name: p.main_grad.clone() for name, p in named if p.requires_grad}


def step(run, batches) -> tuple[dict, dict[str, torch.Tensor]]:
    run.optimizer.step = lambda: (True, 0.0, 0)
    metrics = run.stepper.step(batches)
    return metrics, gradients(run)


def streams(model, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Last hidden states, and the stream after each layer."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out[0])) for layer in model.decoder.layers
    ]
    hidden = forward_model(model, batch)
    for hook in hooks:
        hook.remove()
    return hidden, seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_value_and_gradient_are_those_of_the_definition(dtype, tolerance):
    torch.manual_seed(0)
    found = []
    hidden, target = torch.randn(7, 16, dtype=dtype), torch.randn(7, 16, dtype=dtype)
    weight = torch.tensor([0.0, 1, 1, 0, 0.5, 1, 1])
    for error in (relative_error, reference_relative_error):
        given = hidden.clone().requires_grad_()
        value = error(given, target, weight)
        (3 * value).backward()
        found.append((value.detach(), given.grad))
    for mine, wanted in zip(*found):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == dtype
    assert not found[0][1][[0, 3]].any() and found[0][1][1].any()


def test_what_is_equal_has_no_error_and_a_target_of_zero_no_infinity():
    x = torch.randn(3, 8, requires_grad=True)
    value = relative_error(x, x.detach().clone(), torch.ones(3))
    value.backward()
    assert value == 0 and not x.grad.any()
    assert relative_error(x, torch.zeros(3, 8), torch.ones(3)).isfinite()


def test_the_gradient_is_that_of_a_plain_sum_over_layers_and_tokens(rows):
    run, batches = rows(hidden_loss_coeff=COEFF, moe_router_load_balancing_type="none")
    metrics, found = step(run, batches)
    model, teacher = run.student.chunks[0], run.teacher.model_chunks[0]
    run.student.wrapped[0].zero_grad_buffer()
    tokens, layers = sum(batch.loss_mask.sum() for batch in batches), len(model.decoder.layers)
    error_sum = 0.0
    for batch in batches:
        with torch.no_grad(), run.teacher._in_place():
            last, wanted = streams(teacher, batch)
        hidden, seen = streams(model, batch)
        loss, _ = row_loss(
            model, batch, hidden, (last, teacher.head_weight()), run.options.loss(), run.stepper.vocab_size
        )
        weight_T = batch.loss_mask.t().flatten()
        errors = [
            reference_relative_error(a.flatten(0, 1), b.flatten(0, 1), weight_T) for a, b in zip(seen, wanted)
        ]
        error = sum(errors) / layers
        error_sum += error.item()
        ((loss + COEFF * error) / tokens).backward()
    assert metrics["hidden_error"] == pytest.approx(error_sum / tokens.item(), rel=1e-5) and error_sum > 0
    for name, wanted in gradients(run).items():
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )


@pytest.mark.parametrize(
    "flags",
    [
        {"teacher_schedule": "alongside"},
        {"teacher_memory": "offload"},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective"},
    ],
    ids=lambda flags: next(iter(flags.values())),
)
def test_another_schedule_has_the_same_gradient(rows, flags):
    run, batches = rows(hidden_loss_coeff=COEFF)
    metrics, wanted = step(run, batches)
    run, batches = rows(hidden_loss_coeff=COEFF, **flags)
    again, found = step(run, batches)
    assert again["hidden_error"] == pytest.approx(metrics["hidden_error"], rel=1e-6)
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-5, atol=1e-7, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_a_borrowed_teacher_is_matched_too(rows):
    flags = {"trainable": "router", "hidden_loss_coeff": COEFF}
    run, batches = rows(**flags)
    metrics, wanted = step(run, batches)
    run, batches = rows(**flags, teacher_memory="shared")
    again, found = step(run, batches)
    assert again["hidden_error"] == metrics["hidden_error"] > 0
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_student_that_is_the_teacher_has_no_error(one_process, world):
    run, batches = tiny_world.run_on_pairs(world, 64, "tp_cp", hidden_loss_coeff=COEFF)
    from zeda_megatron.moe.router_dials import zero_mask

    with zero_mask(run.student.chunks):
        metrics, _ = step(run, batches)
    assert metrics["hidden_error"] == 0.0


def test_without_a_teacher_there_is_nothing_to_match(one_process, world):
    with pytest.raises(UserError, match="--hidden-loss-coeff: --stage pretrain has no teacher"):
        tiny_world.start(world, stage="pretrain", hidden_loss_coeff=1.0)
