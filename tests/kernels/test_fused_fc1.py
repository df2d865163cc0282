"""How fc1 is launched on a GPU: fused where the library has it, else in parts. Launches are written down, not made."""

import ctypes

import pytest
import torch
from groups import fc1_inputs, mlp_inputs

from zeda_kernels import cuda_kernels, kernel_library, reference
from zeda_megatron.ops import grouped_mlp


@pytest.fixture
def launches(monkeypatch):
    """(name, arguments) of each launch on a Hopper GPU whose library has a fused fc1 for up to four groups."""
    found = []

    class Functions:
        @staticmethod
        def zk_fc1_workspace(dtype, arch, groups):
            return 512 if (dtype, arch) == (0, 90) and groups <= 4 else -4

        @staticmethod
        def zk_grouped_workspace(*sizes):
            return 256

    library = type("Library", (), {"functions": Functions})
    monkeypatch.setattr(cuda_kernels, "built_library", lambda: library)
    monkeypatch.setattr(cuda_kernels, "device_facts", lambda index: (90, 132))
    monkeypatch.setattr(cuda_kernels, "launch", lambda x, name, *rest: found.append((name, (*rest, None))))
    return found


def test_one_kernel_writes_pre_and_act_and_their_tails_are_cleared(launches):
    x, fc1, probs, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    pre, act = cuda_kernels.moe_fc1(x, fc1, probs, ends)
    assert pre.shape == (7, 16) and act.shape == (7, 8) and pre.dtype == act.dtype == x.dtype
    (name, arguments), *tails = launches
    kinds = kernel_library._SIGNATURES["zk_fc1"][1]
    values = dict(zip(NAMES, arguments, strict=True))
    assert name == "zk_fc1" and len(kinds) == len(NAMES)
    for kind, value in zip(kinds, arguments):
        kind(value.value if isinstance(value, ctypes.c_void_p) else value)
    sizes = {"dtype": 0, "arch": 90, "tile": 0, "groups": 3, "rows": 7, "width": 8, "k": 16, "sms": 132}
    assert {key: values[key] for key in sizes} == sizes
    pointers = {"ends": ends, "x": x, "probs": probs, "pre": pre, "act": act}
    assert {key: values[key] for key in pointers} == {key: t.data_ptr() for key, t in pointers.items()}
    table = ctypes.cast(values["experts"], ctypes.POINTER(ctypes.c_void_p))
    assert [table[e] for e in range(3)] == [weight.data_ptr() for weight in fc1]
    assert values["workspace_bytes"] == 512
    assert [(name, rest[4]) for name, rest in tails] == [
        ("zk_zero_tail", pre.data_ptr()),
        ("zk_zero_tail", act.data_ptr()),
    ]


NAMES = (
    *("dtype", "arch", "tile", "groups", "rows", "width", "k", "ends", "x", "experts", "probs", "pre", "act"),
    *("workspace", "workspace_bytes", "sms", "stream"),
)


def test_without_a_gradient_pre_is_not_written(launches):
    x, fc1, _, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    act = cuda_kernels.moe_act(x, fc1, None, ends)
    (name, arguments), *tails = launches
    values = dict(zip(NAMES, arguments))
    assert name == "zk_fc1" and values["pre"] is None and values["probs"] is None
    assert values["act"] == act.data_ptr() and len(tails) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_has_no_fused_kernel_is_composed(launches, dtype):
    counts = [3, 0, 2] if dtype == torch.float16 else [1] * 5
    x, fc1, probs, ends = fc1_inputs(counts, 8, 16, extra_rows=2)
    x, fc1 = x.to(dtype), [weight.to(dtype) for weight in fc1]
    pre, act = cuda_kernels.moe_fc1(x, fc1, probs, ends)
    assert [name for name, _ in launches] == ["zk_grouped", "zk_zero_tail", "zk_swiglu"]
    assert pre.shape[1] == 2 * act.shape[1]
    launches.clear()
    assert cuda_kernels.moe_act(x, fc1, probs, ends).shape == act.shape
    assert [name for name, _ in launches] == ["zk_grouped", "zk_zero_tail", "zk_swiglu"]


def test_ends_of_another_length_are_refused(launches):
    x, fc1, probs, ends = fc1_inputs([3, 0, 2], 8, 16, extra_rows=2)
    with pytest.raises(RuntimeError, match=r"ends must be \[3\]"):
        cuda_kernels.moe_fc1(x, fc1, probs, ends[:2])
    assert not launches


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
