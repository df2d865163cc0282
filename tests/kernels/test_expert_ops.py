"""The contract of torch.ops.zeda: gradients, fake tensors, compilation, and what PyTorch computes."""

import pytest
import torch
from groups import Draw, ends_of, mlp_inputs
from torch.nn import functional as F

import zeda_kernels.expert_ops as expert_ops

ops = torch.ops.zeda
COUNTS = [[3, 0, 2], [0, 0, 4], [5, 0], [0, 0]]


def arguments(counts=(3, 0, 2), extra_rows=2, grad=False):
    """Valid arguments for every operator, in float64."""
    x, probs, ends, fc1, fc2 = mlp_inputs(list(counts), 4, 2, extra_rows, grad=grad)
    draw = Draw(seed=1, grad=grad)
    rows, experts = len(x), len(counts)
    dout, pre, act = draw(rows, 4), draw(rows, 4), draw(rows, 2)
    main = [torch.zeros(4, 4, dtype=torch.float64) for _ in range(experts)]
    main2 = [torch.zeros(4, 2, dtype=torch.float64) for _ in range(experts)]
    return {
        "grouped_mm": (x, fc1, ends),
        "grouped_dgrad": (dout, fc1, ends),
        "grouped_wgrad": (dout, x, ends),
        "grouped_wgrad_": (main, dout.detach(), x.detach(), ends, True),
        "swiglu": (pre, probs, ends),
        "swiglu_backward": (act, pre, probs, ends),
        "swiglu_dgrad": (dout, fc2, pre, probs, ends),
        "moe_fc1": (x, fc1, probs, ends),
        "expert_mlp": (x, probs, ends, fc1, fc2),
        "expert_mlp_forward": (x, probs, ends, fc1, fc2),
        "expert_mlp_backward": (dout, x, pre, probs, ends, fc1, fc2),
        "expert_mlp_backward_": tuple(
            [t.detach() for t in part] if isinstance(part, list) else part.detach()
            for part in (dout, x, pre, probs, ends, fc1, fc2, main, main2)
        ),
    }


WITH_GRADIENT = ("grouped_mm", "swiglu", "moe_fc1", "expert_mlp")


@pytest.mark.parametrize("name", sorted(expert_ops.SCHEMAS))
def test_every_operator_keeps_torchs_contract(name):
    torch.library.opcheck(getattr(ops, name), arguments(grad=name in WITH_GRADIENT)[name])


def flat(call, parts):
    """`call` as a function of its float tensors alone, lists included; and these tensors."""
    where = []
    for i, part in enumerate(parts):
        for j, tensor in enumerate(part if isinstance(part, list) else [part]):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                where.append((i, j))

    def run(*tensors):
        filled = [list(part) if isinstance(part, list) else part for part in parts]
        for (i, j), tensor in zip(where, tensors):
            if isinstance(filled[i], list):
                filled[i][j] = tensor
            else:
                filled[i] = tensor
        found = call(*filled)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(out for out in outputs if out.requires_grad)

    return run, [parts[i][j] if isinstance(parts[i], list) else parts[i] for i, j in where]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_are_the_derivatives(name, counts):
    run, tensors = flat(getattr(ops, name), arguments(counts, grad=True)[name])
    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("name", sorted(set(expert_ops.SCHEMAS) - {"grouped_wgrad_", "expert_mlp_backward_"}))
def test_every_operator_compiles_into_one_graph(name):
    torch.compiler.reset()  # each operator is a new graph of the same line
    call, parts = getattr(ops, name), arguments()[name]
    compiled = torch.compile(lambda *a: call(*a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*parts), call(*parts), rtol=0, atol=0)


def test_a_layer_compiles_with_its_gradient():
    def layer(x, probs, ends, fc1, fc2):
        return ops.expert_mlp(x, probs, ends, fc1, fc2)[0].sin()

    x, probs, ends, fc1, fc2 = mlp_inputs([3, 0, 2], 4, 2, extra_rows=2, grad=True)
    wanted = [x, probs, *fc1, *fc2]
    grads = [
        torch.autograd.grad(run(x, probs, ends, fc1, fc2).square().sum(), wanted)
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    ]
    torch.testing.assert_close(*grads)


def test_gradients_of_the_weights_add_to_the_main_gradients_in_float32():
    x, probs, ends, fc1, fc2 = mlp_inputs([3, 0, 4], 16, 8, dtype=torch.bfloat16)
    out, pre = ops.expert_mlp(x, probs, ends, fc1, fc2)
    dx, dprobs, dfc1, dfc2 = ops.expert_mlp_backward(out, x, pre, probs, ends, fc1, fc2)
    before = Draw(seed=5, dtype=torch.float32)
    main1, main2 = before.experts(3, 16, 16), before.experts(3, 16, 8)
    kept = [t.clone() for t in (*main1, *main2)]
    found = ops.expert_mlp_backward_(out, x, pre, probs, ends, fc1, fc2, main1, main2)
    assert torch.equal(found[0], dx) and torch.equal(found[1], dprobs)
    assert dfc1.dtype == torch.float32
    for main, old, new in zip((*main1, *main2), kept, (*dfc1, *dfc2)):
        torch.testing.assert_close(main, old + new)
    assert torch.equal(main1[1], kept[1])


@pytest.mark.parametrize("counts", COUNTS)
def test_without_a_gradient_the_layer_is_the_same(counts):
    inputs = mlp_inputs(counts, 8, 4, extra_rows=2)
    assert torch.equal(ops.expert_mlp_forward(*inputs), ops.expert_mlp(*inputs)[0])


@pytest.mark.parametrize("counts", COUNTS)
def test_products_equal_torchs_grouped_mm(counts):
    draw = Draw(dtype=torch.float32, grad=True)
    rows = sum(counts)
    x, weights, ends = draw(rows, 16), draw.experts(len(counts), 8, 16), ends_of(counts)
    mine = ops.grouped_mm(x, weights, ends)
    theirs = F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)
    torch.testing.assert_close(mine, theirs)
    dy = torch.randn(rows, 8)
    for a, b in zip(
        torch.autograd.grad(mine, [x, *weights], dy), torch.autograd.grad(theirs, [x, *weights], dy)
    ):
        torch.testing.assert_close(a, b)


def test_rows_past_the_last_end_do_nothing_even_as_nan():
    x, probs, ends, fc1, fc2 = mlp_inputs([3, 2], 8, 4, extra_rows=3)
    clean = ops.expert_mlp(x, probs, ends, fc1, fc2)
    x[5:], probs[5:] = float("nan"), float("nan")
    out, pre = ops.expert_mlp(x, probs, ends, fc1, fc2)
    assert torch.equal(out, clean[0]) and not out[5:].any()
    found = ops.expert_mlp_backward(torch.full_like(out, 0.5), x, pre, probs, ends, fc1, fc2)
    assert all(part.isfinite().all() for part in found)
    assert not found[0][5:].any() and not found[1][5:].any()


@pytest.mark.parametrize("ends", [[2, 9], [-3, 4], [3, 1], [9, 9], [-1, -1]])
def test_ends_that_make_no_sense_touch_no_memory_but_the_rows(ends):
    x, _, _, fc1, _ = mlp_inputs([2, 2], 8, 4)
    out = ops.grouped_mm(x, fc1, torch.tensor(ends, dtype=torch.int32))
    assert out.shape == (4, 8) and out.isfinite().all()


def test_mixed_precision_sums_in_float32():
    x, probs, ends, fc1, fc2 = mlp_inputs([40, 0, 24], 64, 32, dtype=torch.bfloat16)
    exact = ops.expert_mlp(
        *[
            [t.double() for t in part]
            if isinstance(part, list)
            else part.double()
            if part.is_floating_point()
            else part
            for part in (x, probs, ends, fc1, fc2)
        ]
    )
    mine = ops.expert_mlp(x, probs, ends, fc1, fc2)
    assert mine[0].dtype == torch.bfloat16
    assert (mine[0].double() - exact[0]).norm() / exact[0].norm() < 1e-2
