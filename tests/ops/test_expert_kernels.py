"""Kernels that another distribution brings: found by their entry point, and not missed where they are absent."""

from importlib.metadata import EntryPoint

import pytest
import torch

from zeda_megatron.errors import UserError
from zeda_megatron.moe.experts import backend_for
from zeda_megatron.ops import expert_kernels
from zeda_megatron.ops.grouped_mlp import grouped_mlp
from zeda_megatron.planning import doctor

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch):
    """Let these values of entry points be all that is installed."""

    def install(*values: str):
        points = [EntryPoint("x", value, expert_kernels.GROUP) for value in values]
        monkeypatch.setattr(expert_kernels, "entry_points", lambda group: points)
        monkeypatch.setattr(expert_kernels, "find", expert_kernels.find.__wrapped__)  # looks each time

    return install


def test_this_projects_are_found_by_their_metadata():
    from zeda_kernels.experts import KERNELS

    assert expert_kernels.find.__wrapped__() is KERNELS


def test_without_them_experts_run_as_ever_and_asking_for_them_names_the_installation(installed):
    installed()
    assert backend_for("auto", CPU, torch.float32) == backend_for("auto", GPU, torch.bfloat16) == "grouped_mm"
    for device in (CPU, GPU):
        with pytest.raises(
            UserError, match=r"--expert-backend kernels: .*pip install \./kernels.*or use auto"
        ):
            backend_for("kernels", device, torch.bfloat16)
    rows, weights = torch.ones(2, 4), [torch.ones(8, 4)]
    with pytest.raises(UserError, match=r"pip install \./kernels"):
        grouped_mlp(rows, torch.ones(2), [2], weights, [torch.ones(4, 4)], "kernels")
    found = doctor.inspect()
    assert found.kernels is None and found.problems == ()


def test_those_that_cannot_be_imported_are_one_clear_line_and_the_cpus_default_never_looks(installed):
    installed("zeda_nowhere.experts:KERNELS")
    with pytest.raises(UserError, match=r"zeda_nowhere.experts:KERNELS cannot be imported .*pip install"):
        backend_for("auto", GPU, torch.bfloat16)
    assert backend_for("auto", CPU, torch.float32) == "grouped_mm"
    (problem,) = doctor.inspect().problems
    assert "zeda_nowhere" in problem


@pytest.mark.parametrize(("installed_version", "missing"), [(None, "not installed"), ("0.1.0", "not built")])
def test_the_doctor_tells_what_is_missing(installed_version, missing):
    on = doctor.Machine("3.11.0", {"zeda_kernels": installed_version}, (), "absent", None)
    (route,) = [route for route in doctor.routes(on) if route.operator == "experts"]
    assert route.path == "grouped_mm" and f"{missing} (kernels/README.md)" in route.why


@pytest.mark.parametrize(
    ("packages", "problem", "path", "why"),
    [
        ((), None, "kernels", "this project's kernels found"),
        ((), "too old a driver", "grouped_mm", "not this project's kernels: too old a driver"),
        (("transformer-engine",), None, "Transformer Engine, grouped GEMM", "--expert-backend kernels takes"),
        (("transformer-engine",), "too old a driver", "Transformer Engine, grouped GEMM", "too old a driver"),
    ],
)
def test_the_doctor_tells_why_a_gpu_does_not_take_them(packages, problem, path, why):
    gpu = ({"name": "invented", "compute_capability": "9.0", "memory_gib": 80.0},)
    packages = dict.fromkeys(("zeda_kernels", *packages), "1")
    on = doctor.Machine("3.11.0", packages, (), "absent", "13.0", gpu, None, "x.so", problem)
    (route,) = [route for route in doctor.routes(on) if route.operator == "experts"]
    assert route.path == path and why in route.why
