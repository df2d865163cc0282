"""The relative error of a residual stream, against its definition."""

import pytest
import torch

from zeda_megatron.ops.relative_error import reference_relative_error, relative_error


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
