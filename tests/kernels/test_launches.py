"""How products are launched on a GPU: by one kernel on Hopper, else in parts. Launches are written down, not made."""

import ctypes

import pytest
import torch
from groups import fc1_inputs, mlp_inputs

from zeda_kernels import cuda_kernels, kernel_library, reference
from zeda_kernels.expert_table import ExpertTable
from zeda_megatron.errors import UserError
from zeda_megatron.ops import grouped_mlp


class Gpu:
    """Launches (name, arguments) on a GPU of this architecture; maps are as many bytes as they would be."""

    def __init__(self, monkeypatch, arch):
        self.launches, self.maps = [], []
        library = type("Library", (), {"functions": self, "call": self.call})()
        monkeypatch.setattr(cuda_kernels, "built_library", lambda: library)
        monkeypatch.setattr(cuda_kernels, "device_facts", lambda index: (arch, 132))
        monkeypatch.setattr(cuda_kernels, "launch", self.launch)
        cuda_kernels._maps.cache_clear()

    def zk_grouped_workspace(self, *sizes):
        return 256

    def zk_tiles(self, tile, columns):
        return -(-columns // (256 if tile else 128))

    def call(self, name, dtype, groups, n, k, table, maps):
        assert name == "zk_maps"
        self.maps.append((dtype, groups, n, k, [table[e] for e in range(groups)]))

    def launch(self, x, name, *arguments):
        for kind, value in zip(kernel_library._SIGNATURES[name][1], (*arguments, None), strict=True):
            kind(value.value if isinstance(value, ctypes.c_void_p) else value)
        self.launches.append((name, arguments))

    @property
    def names(self):
        return [name for name, _ in self.launches]


@pytest.fixture
def hopper(monkeypatch):
    return Gpu(monkeypatch, 90)


@pytest.fixture
def ampere(monkeypatch):
    return Gpu(monkeypatch, 80)


ROWS = "product dtype tile lead groups rows columns depth ends x maps probs pre out act sums sms".split()


def test_one_kernel_writes_pre_and_act(hopper):
    x, fc1, probs, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    pre, act = cuda_kernels.moe_fc1(x, fc1, probs, ends)
    assert pre.shape == (7, 16) and act.shape == (7, 8) and pre.dtype == act.dtype == x.dtype
    ((name, arguments),) = hopper.launches
    values = dict(zip(ROWS, arguments, strict=True))
    sizes = {
        "product": 3,
        "dtype": 0,
        "tile": 0,
        "lead": 2,
        "groups": 3,
        "rows": 7,
        "columns": 8,
        "depth": 16,
        "sms": 132,
    }
    assert name == "zk_rows" and {key: values[key] for key in sizes} == sizes
    pointers = {"ends": ends, "x": x, "probs": probs, "pre": pre, "out": act}
    assert {key: values[key] for key in pointers} == {key: t.data_ptr() for key, t in pointers.items()}
    assert hopper.maps == [(0, 3, 16, 16, [weight.data_ptr() for weight in fc1])]


def test_the_lead_of_a_large_tile_may_be_named(hopper, monkeypatch):
    x, weights, _, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    monkeypatch.setenv("ZEDA_KERNEL_LEAD", "3")
    cuda_kernels.grouped_mm(x, weights, ends)
    assert dict(zip(ROWS, hopper.launches[0][1]))["lead"] == 3
    monkeypatch.setenv("ZEDA_KERNEL_LEAD", "4")
    with pytest.raises(UserError, match=r"ZEDA_KERNEL_LEAD=4: choose from 0, 1, 2, 3, or unset it"):
        cuda_kernels.grouped_mm(x, weights, ends)


@pytest.mark.parametrize(("product", "columns", "depth"), [("grouped_mm", 16, 24), ("grouped_dgrad", 24, 16)])
def test_forward_and_dgrad_are_one_kernel_each_over_the_same_maps(hopper, product, columns, depth):
    x, weights, _, ends = fc1_inputs([3, 0, 2], 8, 24, extra_rows=2)
    rows = x if product == "grouped_mm" else x[:, :16]
    out = getattr(cuda_kernels, product)(rows, weights, ends)
    cuda_kernels.grouped_mm(x, weights, ends)
    assert out.shape == (7, columns) and hopper.names == ["zk_rows"] * 2
    values = dict(zip(ROWS, hopper.launches[0][1]))
    assert (values["columns"], values["depth"]) == (columns, depth) and values["pre"] is None
    assert values["product"] == (0 if product == "grouped_mm" else 1)
    assert len(hopper.maps) == 1 and hopper.launches[0][1][10] == hopper.launches[1][1][10]


def test_a_layer_is_two_launches_forward_and_its_maps_are_made_once(hopper):
    x, probs, ends, fc1, fc2 = mlp_inputs([3, 0, 2], 16, 8, dtype=torch.bfloat16)
    fc1, fc2 = ExpertTable(fc1), ExpertTable(fc2)
    for _ in range(3):
        act = cuda_kernels.moe_act(x, fc1, probs, ends)
        cuda_kernels.grouped_mm(act, fc2, ends)
    assert hopper.names == ["zk_rows"] * 6 and len(hopper.maps) == 2
    fc1[1].data = fc1[1].clone()
    cuda_kernels.moe_act(x, fc1, probs, ends)
    assert len(hopper.maps) == 3 and hopper.maps[2][4][1] == fc1[1].data_ptr()


def test_without_a_gradient_pre_is_not_written(hopper):
    x, fc1, _, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    act = cuda_kernels.moe_act(x, fc1, None, ends)
    values = dict(zip(ROWS, hopper.launches[0][1]))
    assert values["pre"] is None and values["probs"] is None and values["out"] == act.data_ptr()


def test_the_gradient_of_the_activation_is_one_kernel_and_a_sum(hopper):
    _, probs, ends, _, fc2 = mlp_inputs([3, 0, 2], 16, 264, extra_rows=2, dtype=torch.bfloat16)
    dout, pre = torch.randn(7, 16).bfloat16(), torch.randn(7, 528).bfloat16()
    dpre, act, dprobs = cuda_kernels.swiglu_dgrad(dout, fc2, pre, probs, ends)
    ((name, arguments),) = hopper.launches
    values = dict(zip(ROWS, arguments))
    sizes = {"product": 4, "columns": 264, "depth": 16, "out": dpre.data_ptr(), "act": act.data_ptr()}
    assert name == "zk_rows" and {key: values[key] for key in sizes} == sizes
    assert dpre.shape == pre.shape and act.shape == (7, 264) and not dprobs.any() and dprobs.shape == (7,)
    assert hopper.maps[0][2:4] == (16, 264)


def test_other_gpus_take_the_product_the_tail_and_the_activation_apart(ampere):
    x, fc1, probs, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    pre, act = cuda_kernels.moe_fc1(x, fc1, probs, ends)
    assert ampere.names == ["zk_grouped", "zk_zero_tail", "zk_swiglu"] and pre.shape[1] == 2 * act.shape[1]
    ampere.launches.clear()
    assert cuda_kernels.moe_act(x, fc1, probs, ends).shape == act.shape
    assert ampere.names == ["zk_grouped", "zk_zero_tail", "zk_swiglu"] and not ampere.maps


def test_ends_of_another_length_are_refused(hopper):
    x, fc1, probs, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    with pytest.raises(RuntimeError, match=r"ends must be \[3\]"):
        cuda_kernels.moe_fc1(x, fc1, probs, ends[:2])
    assert not hopper.launches


@pytest.mark.parametrize(
    ("wanted", "enabled", "keeps"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_the_layer_keeps_pre_only_where_a_gradient_needs_it(monkeypatch, wanted, enabled, keeps):
    x, probs, _, fc1, fc2 = mlp_inputs([3, 2], 8, 4)
    probs.requires_grad_(wanted)
    called = []
    for name in ("moe_fc1", "moe_act"):
        inner = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, n=name, f=inner: called.append(n) or f(*a))
    with torch.set_grad_enabled(enabled):
        out = grouped_mlp.grouped_mlp(x, probs, [3, 2], fc1, fc2, "kernels")
    assert called[0] == ("moe_fc1" if keeps else "moe_act")
    assert out.requires_grad == (wanted and enabled)
