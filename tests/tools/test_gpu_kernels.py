"""The checks of kernels that are rarely installed: skipped with a reason, failed on a difference."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.gpu import kernels as gpu_kernels
from tools.gpu import validate as gpu_validate


def run(device="cuda", losses=None):
    """Stands for a `Validation` whose runs end in `losses`, one per call."""
    calls, losses = [], iter(losses or [])

    def train(save, *flags, processes=1):
        calls.append((save, flags, processes))
        return [{"loss": next(losses)}]

    return SimpleNamespace(device=device, train=train, calls=calls)


def test_what_is_not_here_is_skipped_with_its_reason(monkeypatch):
    assert gpu_kernels.flex(run("cpu")) == {"skipped": "needs GPUs"}
    assert gpu_kernels.permute_fusion(run("cpu")) == {"skipped": "needs a GPU"}
    assert gpu_kernels.own_kernels(run("cpu")) == {"skipped": "needs a GPU"}
    monkeypatch.setattr(gpu_kernels, "why_not", lambda device, dtype: "the kernels are not built")
    assert gpu_kernels.own_kernels(run()) == {"skipped": "the kernels are not built"}
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda name: None)
    assert gpu_kernels.flex(run()) == {"skipped": "deep_ep is not installed"}
    assert "Transformer Engine" in gpu_kernels.permute_fusion(run())["skipped"]
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda name: "here")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "two GPUs" in gpu_kernels.flex(run())["skipped"]
    assert gpu_validate._state({"ok": True, "skipped": "why"}) == "skip"
    assert [gpu_validate._state({"ok": ok}) for ok in (True, False)] == ["ok", "FAIL"]


@pytest.mark.parametrize(("losses", "ok"), [([2.0, 2.001], True), ([2.0, 2.5], False)])
def test_a_difference_fails(monkeypatch, losses, ok):
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda name: "here")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for check, processes in ((gpu_kernels.flex, 2), (gpu_kernels.permute_fusion, 1)):
        made = run(losses=losses)
        assert check(made)["ok"] is ok
        assert [call[2] for call in made.calls] == [processes] * 2 and made.calls[0][1] != made.calls[1][1]


@pytest.mark.parametrize(("code", "ok"), [(0, True), (1, False)])
def test_own_kernels_fail_with_their_tests_and_keep_the_benchmark(monkeypatch, tmp_path, code, ok):
    made = run(losses=[2.0, 2.001])
    made.root = made.work = tmp_path
    made.command = lambda *parts: Path(parts[-1]).write_text('{"timings": []}')
    done = SimpleNamespace(
        returncode=code, stdout="FAILED tests/gpu/x\n3 failed, 90 passed, 5 deselected in 9s"
    )
    monkeypatch.setattr(gpu_kernels, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(gpu_kernels.subprocess, "run", lambda *a, **k: done)
    result = gpu_kernels.own_kernels(made)
    assert result["ok"] is ok and result["tests"] == {"failed": 3, "passed": 90}
    assert result["bench"] == {"timings": []} and result["failures"] == ["FAILED tests/gpu/x"]
    assert "timings" not in gpu_validate._summary(result)
