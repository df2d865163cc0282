"""Tables of addresses: made again when a weight has moved, and only then; and what training does with them."""

import copy
import ctypes

import pytest
import torch
from groups import mlp_inputs

from zeda_kernels import experts
from zeda_kernels.expert_table import ExpertTable, as_table

CPU = torch.device("cpu")
KIND = (8, 16), torch.float32, CPU


def weights(count=3):
    return [torch.nn.Parameter(torch.randn(8, 16)) for _ in range(count)]


def addresses(array):
    return list(ctypes.cast(array, ctypes.POINTER(ctypes.c_void_p))[: len(array)])


def test_a_table_is_made_once_and_again_when_a_weight_has_moved():
    table = ExpertTable(weights())
    first = table.array(*KIND)
    assert table.array(*KIND) is first and addresses(first) == [w.data_ptr() for w in table]
    table[1].data = torch.randn(8, 16)
    second = table.array(*KIND)
    assert second is not first and addresses(second) == [w.data_ptr() for w in table]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.randn(8, 15), r"every expert must be \(8, 16\).*\(8, 15\)"),
        (torch.randn(8, 16).half(), r"torch.float16"),
        (torch.randn(16, 8).T, r"must be contiguous"),
    ],
)
def test_a_weight_that_has_changed_its_kind_is_refused_then(data, message):
    table = ExpertTable(weights())
    table.array(*KIND)
    table[2] = torch.nn.Parameter(data)
    with pytest.raises(RuntimeError, match=message):
        table.array(*KIND)


def test_a_copy_of_a_table_has_the_addresses_of_its_own_weights():
    table = ExpertTable(weights())
    table.array(*KIND)
    other = copy.deepcopy(table)
    assert type(other) is ExpertTable and as_table(other) is other
    assert addresses(other.array(*KIND)) == [w.data_ptr() for w in other] != addresses(table.array(*KIND))


def test_what_trains_is_seen_when_it_changes():
    table = ExpertTable(weights())
    assert table.trained() == (True, None)  # no buffers
    for weight in table:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(8, 16), False
    trained, main = table.trained()
    assert trained and [a is b.main_grad for a, b in zip(main, table)] == [True] * 3
    for weight in table:
        weight.main_grad = torch.zeros(8, 16)
    assert table.trained()[1][1] is table[1].main_grad
    for weight in table:
        weight.requires_grad_(False)
    assert table.trained() == (False, None)


def layer(train: bool):
    """Inputs of a layer whose weights have buffers, and its gradients of x and probs as the operator has them."""
    x, probs, ends, fc1, fc2 = mlp_inputs([3, 0, 4], 16, 8, dtype=torch.float32, grad=True)
    out = torch.ops.zeda.expert_mlp(x, probs, ends, fc1, fc2)[0]
    found = torch.autograd.grad(out.square().sum(), [x, probs, *fc1, *fc2])
    fc1, fc2 = (
        ExpertTable(torch.nn.Parameter(w.detach(), requires_grad=train) for w in part) for part in (fc1, fc2)
    )
    for weight in (*fc1, *fc2) if train else ():
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    return x, probs, ends, fc1, fc2, found


@pytest.mark.parametrize("train", [True, False])
def test_gradients_are_those_of_the_operator_and_weights_share_one_that_nobody_reads(train):
    x, probs, ends, fc1, fc2, wanted = layer(train)
    for _ in range(2):  # the second time the tables are there
        experts.mlp(x, probs, ends, fc1, fc2).square().sum().backward()
        torch.testing.assert_close([x.grad, probs.grad], list(wanted[:2]))
        x.grad = probs.grad = None
        if train:
            for part in (fc1, fc2):
                assert len({w.grad.data_ptr() for w in part}) == 1, "autograd has made copies"
                for weight in part:
                    assert weight.grad_added_to_main_grad
                    weight.grad = None
    if train:
        found = [(weight.main_grad - 1) / 2 for weight in (*fc1, *fc2)]
        torch.testing.assert_close(found, list(wanted[2:]), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_is_one_graph():
    x, probs, ends, fc1, fc2, wanted = layer(False)
    compiled = torch.compile(lambda *a: experts.mlp(*a), backend="aot_eager", fullgraph=True)
    out = compiled(x, probs, ends, list(fc1), list(fc2))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), [x, probs]), wanted[:2])
