"""Ridge regressions of all experts of a layer, from streams of rows."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from ridge_reference import dense_ridge

from zeda_megatron.errors import UserError
from zeda_megatron.fit.ridge import Explained, RidgeSums, fill_empty, sums_bytes


def rows(count=400, experts=3, size=12, seed=0, mean=5.0):
    """Inputs with a mean far from 0, noisy linear answers, sorted by expert; the last expert has none."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=draw) + mean
    expert = torch.randint(0, experts - 1, (count,), generator=draw).sort().values
    truth = torch.randn(experts, size, generator=draw)
    return x, ((x - mean) * truth[expert]).sum(1) + 0.1 * torch.randn(count, generator=draw) - 2, expert


def streamed(x, y, expert, experts=3, piece=90):
    """Sums of rows that come in pieces, each sorted by expert."""
    sums = RidgeSums(experts, x.shape[1], torch.device("cpu"))
    for first in range(0, len(y), piece):
        sums.add(*(part[first : first + piece] for part in (x, y, expert)))
    return sums


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_streaming_fit_equals_a_dense_least_squares_solver(ridge):
    x, y, expert = rows()
    sums = streamed(x, y, expert)
    weight, bias = sums.solve(ridge)
    for e in range(2):
        expected_weight, expected_bias = dense_ridge(x[expert == e], y[expert == e], ridge)
        tiny.close(weight[e].double(), expected_weight, atol=1e-5, rtol=1e-5)
        tiny.close(bias[e].double(), expected_bias, atol=1e-4, rtol=1e-5)
        assert sums.constants()[e].item() == pytest.approx(float(y[expert == e].mean()), rel=1e-5)
    assert not weight[2].any() and bias[2] == 0


def test_single_precision_sums_are_enough_even_for_channels_far_from_zero():
    """Outlier channels: mean 1000, spread 1, as in the residual streams of large models."""
    x, y, _ = rows(60_000, experts=2, size=24, mean=0.0)
    x[:, ::3] += 1000.0
    expert = torch.zeros(len(y), dtype=torch.long)
    weight, _ = streamed(x, y, expert, experts=1, piece=500).solve(1.0)
    expected, _ = dense_ridge(x, y, 1.0)
    assert (weight[0] - expected).norm() / expected.norm() < 1e-4
    # Without taking the mean away first, single precision is not.
    raw = (x.t() @ x).double() / len(x) - torch.outer(x.double().mean(0), x.double().mean(0))
    exact = torch.cov(x.double().t(), correction=0)
    assert (raw - exact).abs().max() > 0.01


def test_the_constant_of_an_expert_with_one_row_is_that_row():
    x, y, _ = rows(2)
    weight, bias = streamed(x[:1], y[:1], torch.zeros(1, dtype=torch.long), 1).solve(1.0)
    assert torch.equal(weight, torch.zeros(1, 12)) and bias.item() == pytest.approx(y[0].item(), rel=1e-6)


def test_few_rows_leave_the_head_near_the_constant_and_many_do_not():
    """The penalty does not grow with the rows: error on fresh rows of the same expert."""
    size, draw = 64, torch.Generator().manual_seed(3)
    truth = torch.randn(size, generator=draw) / size**0.5

    def sample(count):
        x = torch.randn(count, size, generator=draw)
        return x, x @ truth + 0.5 * torch.randn(count, generator=draw), torch.zeros(count, dtype=torch.long)

    x_new, y_new, _ = sample(5000)
    error = {}
    for count in (4, 64, 6400):
        weight, bias = streamed(*sample(count), experts=1, piece=10**6).solve(1.0)
        error[count] = float((y_new - x_new @ weight[0] - bias[0]).var() / y_new.var())
    assert error[4] < 1.1 and error[64] < 0.9 and error[6400] == pytest.approx(0.2, abs=0.02)


def test_experts_without_rows_get_the_mean_over_the_others():
    values, count = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([9.0, 0.0, 1.0])
    assert fill_empty(values, count).tolist() == [1.0, 2.5, 4.0]
    assert fill_empty(values, count * 0).tolist() == [0.0, 0.0, 0.0]


def test_a_ridge_that_cannot_be_solved_is_named():
    x = torch.ones(8, 12)
    x[4:] = -1.0
    with pytest.raises(UserError, match="--ridge 1e-30"):
        streamed(x, x[:, 0], torch.zeros(8, dtype=torch.long), 1).solve(1e-30)


def test_explained_variance_is_the_textbooks():
    x, y, expert = rows()
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    bias, constant = torch.tensor([0.5, -1.0, 9.0]), torch.tensor([1.0, 2.0, 9.0])
    part = Explained(lambda e, x: x @ weight[e] + bias[e], constant)
    for piece in torch.arange(400).split(150):
        part.add(x[piece], y[piece], expert[piece])
    total = (y - y.mean()).square().sum()
    wanted = 1 - (y - (x * weight[expert]).sum(1) - bias[expert]).square().sum() / total
    of_constants = 1 - (y - constant[expert]).square().sum() / total
    assert part.r2() == pytest.approx((float(wanted), float(of_constants)), rel=1e-4)


def test_the_bound_on_memory_is_what_the_sums_take():
    sums = RidgeSums(4, 256, torch.device("cpu"))
    assert sums_bytes(4, 256) == sum(part.nbytes for part in vars(sums).values())


REAL = """
import json, resource, time, torch
from zeda_megatron.fit.ridge import RidgeSums
N, H, rows = 128, 2048, 2048 * 8
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
sums = RidgeSums(N, H, torch.device("cpu"))
x, expert = torch.randn(rows, H), torch.arange(N).repeat_interleave(rows // N)
y = x[:, 0] + torch.randn(rows)
times = []
for _ in range(2):
    start = time.process_time()
    sums.add(x, y, expert)
    times.append(time.process_time() - start)
start = time.process_time()
weight, bias = sums.solve(1.0)
print(json.dumps({"bytes": peak() - before, "input": x.nbytes, "add": times[1],
                  "solve": time.process_time() - start, "finite": bool(weight.isfinite().all())}))
"""


@pytest.mark.slow
def test_a_layer_of_a_real_model_is_fitted_in_the_memory_that_is_announced(capsys):
    """128 experts, 2048 channels, one thread; prints seconds of the processor and the peak."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{measured}, sums {sums_bytes(128, 2048)}")
    spare = 2 * 8 * 2048**2 + 2 * 4 * 128 * 2048 + 3e8  # matrices of the solver, heads, libraries
    assert measured["finite"]
    assert measured["bytes"] < sums_bytes(128, 2048) + measured["input"] + spare
