"""The operators on a GPU against float64: numbers, empty groups, repeatability, graphs, memory errors.

Each test also runs on the CPU, so that it is itself tested where no GPU is: with the operators' reference, and, in the
slow suite where nvcc is, with the kernels interpreted (`tests/kernels/ptx`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from groups import Draw, ends_of, exact, fc1_inputs, mlp_inputs, near
from ptx import operators
from ptx.machine import Machine

import zeda_kernels.expert_ops  # noqa: F401  (registers torch.ops.zeda)
from zeda_kernels import cuda_kernels, kernel_call, reference

ops = torch.ops.zeda
gpu = pytest.mark.gpu


@pytest.fixture(
    params=["cpu", pytest.param("interpreted", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)]
)
def device(request):
    params = request.node.callspec.params
    counts = params.get("counts", [])
    if request.param == "cpu" and (params.get("tile") or sum(counts) > 2000):
        pytest.skip("tiles and multiprocessors are no matter of the reference")
    if request.param == "interpreted":
        if len(counts) > 40 or sum(counts) > 1500:
            pytest.skip("would take minutes interpreted")
        made, compiled = request.getfixturevalue("interpreted_library")
        with operators.interpreted(made, Machine(made.functions, compiled)):
            yield torch.device("cpu")
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        reason = kernel_call.why_not(torch.device("cuda", 0), torch.bfloat16)
        if reason:
            pytest.skip(reason)
    yield torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def rows(device, request):
    """The module whose functions the operators are made of there."""
    return reference if request.node.callspec.params["device"] == "cpu" else cuda_kernels


@pytest.fixture
def kernels(device, rows):
    """Where the kernels run: on a GPU or interpreted."""
    if rows is reference:
        pytest.skip("says something of the kernels only")
    return device


@pytest.fixture
def cuda(device):
    if device.type == "cpu":
        pytest.skip("says something of a GPU only")
    return device


def poison(device, *tensors):
    """Fill the memory that the next allocations of these sizes reuse with NaN."""
    if device.type == "cuda":
        kept = [torch.full_like(t, float("nan")) for t in tensors for _ in range(3)]
        torch.cuda.synchronize()
        del kept


CASES = {
    "one expert": [129],
    "around a tile": [63, 64, 65, 127, 128, 129, 1, 0],
    "first and last empty": [0, 40, 0, 0, 9, 0],
    "all empty": [0, 0, 0],
    **{f"{e} experts": [(e_ * 7) % 11 for e_ in range(e)] for e in (31, 32, 33, 65, 128, 129, 257)},
    "one takes all of 128": [0] * 77 + [513] + [0] * 50,
}


@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (136, 72)])
def test_layer_and_gradients_are_near_float64(device, counts, hidden, width):
    inputs = mlp_inputs(counts, hidden, width, extra_rows=5, dtype=torch.bfloat16, device=device)
    x, probs, ends, fc1, fc2 = inputs
    real = sum(counts)
    x[real:], probs[real:] = float("nan"), float("nan")
    poison(device, x, x[:, :1].expand(-1, 2 * width).contiguous())
    out, pre = ops.expert_mlp(*inputs)
    dout = Draw(seed=2, dtype=torch.bfloat16, device=device)(*out.shape)
    found = ops.expert_mlp_backward(dout, x, pre, probs, ends, fc1, fc2)
    wide = exact(inputs)
    expected, wide_pre = ops.expert_mlp(*wide)
    near(out, expected, 1e-2)
    wide_found = ops.expert_mlp_backward(exact(dout), wide[0], wide_pre, *wide[1:])
    for mine, right in zip(found, wide_found):
        near(mine, right, 2e-2)
    for stacked in found[2:]:
        assert not stacked[[e for e, count in enumerate(counts) if count == 0]].any()


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
def test_products_of_both_tiles(device, counts, tile, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    draw = Draw(dtype=torch.bfloat16, device=device)
    rows, n, k = sum(counts) + 3, 264, 200
    x, dy, weights, ends = (
        draw(rows, k),
        draw(rows, n),
        draw.experts(len(counts), n, k),
        ends_of(counts, device),
    )
    poison(device, x, dy)
    near(ops.grouped_mm(x, weights, ends), reference.grouped_mm(exact(x), exact(weights), exact(ends)), 5e-3)
    near(
        ops.grouped_dgrad(dy, weights, ends),
        reference.grouped_dgrad(exact(dy), exact(weights), exact(ends)),
        5e-3,
    )


FC1_CASES = CASES | {
    "around a cluster": [255, 256, 257, 0, 1],
    "more tiles than multiprocessors": [700] * 30,
}


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("counts", FC1_CASES.values(), ids=FC1_CASES.keys())
@pytest.mark.parametrize(
    ("width", "hidden", "weighted"),
    [(64, 64, False), (200, 136, True), (200, 136, False), (8, 8, True), (264, 328, True)],
)
def test_fc1_and_its_activation(device, rows, counts, width, hidden, tile, weighted, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    x, weights, probs, ends = fc1_inputs(counts, width, hidden, extra_rows=3, device=device)
    probs = probs if weighted else None
    poison(device, x.new_empty(x.shape[0], 2 * width), x.new_empty(x.shape[0], width))
    pre, act = ops.moe_fc1(x, weights, probs, ends)
    wide = exact([x, weights]) + [exact(probs) if weighted else None, exact(ends)]
    expected = reference.moe_fc1(*wide)
    near(pre, expected[0], 5e-3)
    near(act, expected[1], 1e-2)
    assert not pre[sum(counts) :].any() and not act[sum(counts) :].any()
    # The backward pass computes the activation from pre: the same bits, and the same again without keeping pre.
    assert torch.equal(act, ops.swiglu(pre, probs, ends))
    poison(device, act)
    assert torch.equal(act, rows.moe_act(x, weights, probs, ends))
    for _ in range(3 if device.type == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(ops.moe_fc1(x, weights, probs, ends), (pre, act)))


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("width", "hidden", "weighted"), [(64, 64, False), (264, 136, True), (8, 328, True)])
def test_the_gradient_of_the_activation(device, rows, counts, width, hidden, tile, weighted, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    draw, count = Draw(dtype=torch.bfloat16, device=device), sum(counts)
    dout, pre, probs = draw(count + 3, hidden), draw(count + 3, 2 * width), draw(count + 3).float()
    for part in (dout, pre, probs):
        part[count:] = float("nan")
    probs = probs if weighted else None
    weights, ends = draw.experts(len(counts), hidden, width), ends_of(counts, device)
    poison(device, pre, pre[:, :width].contiguous())
    found = ops.swiglu_dgrad(dout, weights, pre, probs, ends)
    wide = [exact(dout), exact(weights), exact(pre), exact(probs) if weighted else None, exact(ends)]
    for mine, right in zip(found, reference.swiglu_dgrad(*wide)):
        near(mine, right, 1e-2)
        assert not mine[count:].any()
    # The activation has the bits that the forward pass had.
    assert torch.equal(found[1], ops.swiglu(pre, probs, ends))
    for _ in range(3 if device.type == "cuda" else 1):
        again = ops.swiglu_dgrad(dout, weights, pre, probs, ends)
        assert all(torch.equal(a, b) for a, b in zip(again, found))


@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradients_overwrite_poison_or_add(device, counts, accumulate):
    draw = Draw(dtype=torch.bfloat16, device=device)
    rows, n, k = sum(counts) + 3, 136, 264
    x, dy, ends = draw(rows, k), draw(rows, n), ends_of(counts, device)
    main = [torch.full((n, k), 2.0 if accumulate else float("nan"), device=device) for _ in counts]
    ops.grouped_wgrad_(main, dy, x, ends, accumulate)
    expected = torch.zeros(len(counts), n, k, dtype=torch.float64)
    reference.grouped_wgrad_(list(expected.unbind(0)), exact(dy), exact(x), exact(ends), False)
    for mine, right in zip(main, expected):
        near(mine, right + 2 * accumulate, 2e-3)


def test_results_repeat_bit_for_bit(device):
    inputs = mlp_inputs([70, 0, 129, 3], 64, 32, dtype=torch.bfloat16, device=device)
    x, probs, ends, fc1, fc2 = inputs

    def run():
        out, pre = ops.expert_mlp(*inputs)
        return out, *ops.expert_mlp_backward(out, x, pre, probs, ends, fc1, fc2)

    first = run()
    for _ in range(20 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


@gpu
def test_a_graph_replays_with_other_counts_and_nothing_waits(cuda):
    inputs = mlp_inputs([40, 0, 24, 0], 64, 32, dtype=torch.bfloat16, device=cuda)
    x, probs, ends, fc1, fc2 = inputs

    def run():
        out, pre = ops.expert_mlp(*inputs)
        again = ops.expert_mlp_forward(*inputs)
        return out, pre, again, *ops.expert_mlp_backward(out, x, pre, probs, ends, fc1, fc2)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run()
    for counts in ([40, 0, 24, 0], [0, 0, 0, 64], [0, 0, 0, 0], [1, 2, 3, 4]):
        ends.copy_(ends_of(counts, cuda))
        graph.replay()
        replayed = [part.clone() for part in captured]
        torch.cuda.set_sync_debug_mode("error")
        try:
            direct = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(replayed, direct)), counts


SMALLEST = """
import torch, zeda_kernels.expert_ops
from groups import mlp_inputs
x, probs, ends, fc1, fc2 = mlp_inputs([3, 0, 2], 16, 8, extra_rows=2, dtype=torch.bfloat16, device="cuda")
out, pre = torch.ops.zeda.expert_mlp(x, probs, ends, fc1, fc2)
torch.ops.zeda.expert_mlp_backward(out, x, pre, probs, ends, fc1, fc2)
torch.ops.zeda.expert_mlp_forward(x, probs, ends, fc1, fc2)
torch.cuda.synchronize()
"""


@gpu
def test_the_sanitizer_finds_nothing_in_the_smallest_case(cuda):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH")
    line = [tool, "--error-exitcode", "7", sys.executable, "-c", SMALLEST]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
