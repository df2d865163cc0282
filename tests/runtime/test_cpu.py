"""Megatron-Core without CUDA: what `install` does to Megatron, and that it leaves everybody else alone."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch

from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.errors import UserError
from zeda_megatron.runtime import cpu, process_groups


def python(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200
    )


def test_megatron_imports_and_recomputes_in_a_fresh_process():
    done = python(
        "from zeda_megatron.runtime import cpu\n"
        "assert cpu.install() and cpu.install()\n"
        "import sys, torch\n"
        "assert sum(type(f).__name__ == '_CoreFinder' for f in sys.meta_path) == 1\n"
        "from megatron.core.models.gpt import GPTModel\n"
        "from megatron.core import parallel_state, jit, utils\n"
        "assert jit.jit_fuser is jit.noop_decorator\n"
        "assert utils.torch.cuda.current_device() == torch.device('cpu')\n"
        "assert utils.torch.ones(2, device='cuda').device.type == 'cpu'\n"
        "import megatron.core.inference.contexts as late\n"
        "mods = [m for n, m in sys.modules.items() if n.startswith('megatron.core') and hasattr(m, 'torch')]\n"
        "assert len(mods) > 50 and all(m.torch is utils.torch for m in mods if m.torch.__name__ == 'torch')\n"
        "print('fine')"
    )
    assert done.stdout == "fine\n", done.stderr


def test_install_is_inert_where_cuda_is_present_and_elsewhere_covers_what_was_imported_before():
    done = python(
        "import torch, sys\n"
        "absent, torch.cuda.is_available = torch.cuda.is_available, lambda: True\n"
        "before = torch.Tensor.type, torch.Tensor.cuda, list(sys.meta_path), torch.cuda.current_device\n"
        "from zeda_megatron.runtime import cpu\n"
        "assert cpu.install() is False\n"
        "assert before == (torch.Tensor.type, torch.Tensor.cuda, list(sys.meta_path), torch.cuda.current_device)\n"
        "import megatron.core.utils as utils\n"
        "assert utils.torch is torch\n"
        "torch.cuda.is_available = absent\n"
        "assert cpu.install()\n"
        "assert utils.torch is not torch and utils.torch.cuda.current_device().type == 'cpu'\n"
        "print('fine')"
    )
    assert done.stdout == "fine\n", done.stderr


def test_user_code_keeps_the_real_torch():
    tensor = torch.ones(2)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.BFloat16Tensor"
    for refused in (torch.cuda.current_device, tensor.cuda, lambda: torch.ones(2, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError)):
            refused()
    assert not torch.cuda.is_available()
    assert torch.cuda.Stream.__module__.startswith("torch.cuda")


def test_megatron_sees_a_gpu_where_it_compares_type_names():
    from megatron.core import utils

    ask = {"__name__": "megatron.core.pretend", "tensor": torch.ones(2), "torch": utils.torch}
    assert eval("tensor.type()", ask) == "torch.cuda.FloatTensor"
    assert eval("tensor.type(torch.float64).dtype", ask) == torch.float64
    assert eval("tensor.cuda()", ask) is ask["tensor"]
    assert eval("torch.zeros(3, device='cuda', pin_memory=True).device.type", ask) == "cpu"
    assert eval("torch.zeros(3, device=torch.cuda.current_device()).device.type", ask) == "cpu"
    assert eval("torch.cuda.Stream().record_event().synchronize()", ask) is None


def test_generators_that_megatron_forks_do_not_disturb_each_other(one_process):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    process_groups.initialize(ParallelConfig(), seed=7)
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), first) and not torch.equal(inside, first)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("found", ["0.15.3", "0.18.1", "0.20.0", "1.0.0", "0.160.0"])
def test_an_unsupported_megatron_is_a_user_error(monkeypatch, found):
    monkeypatch.setattr(cpu, "version", lambda name: found)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f) is not cpu._CoreFinder])
    with pytest.raises(UserError, match=rf"megatron-core {found}.*pip install megatron-core==0\.16\.1"):
        cpu.install()


def test_a_megatron_that_needs_triton_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "version", lambda name: "0.19.2")
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f) is not cpu._CoreFinder])
    with pytest.raises(UserError, match="triton: pip install triton"):
        cpu.install()


def test_what_a_user_can_do_nothing_about_is_silent():
    def heard(name: str, words: str) -> bool:
        record = logging.makeLogRecord({"name": name, "levelno": logging.WARNING, "msg": words})
        return bool(logging.getLogger(name).filter(record))

    cpu.quiet()
    compiler, files = "torch.utils.cpp_extension", "megatron.core.dist_checkpointing.strategies.common"
    assert not heard(compiler, "No CUDA runtime is found, using CUDA_HOME='/usr'")
    assert not heard(files, "load_common is deprecated and will be removed in a future release.")
    assert heard(compiler, "No compiler is found") and heard(files, "a file is missing")


def test_a_missing_megatron_is_a_user_error(monkeypatch):
    def absent(name):
        raise cpu.PackageNotFoundError(name)

    monkeypatch.setattr(cpu, "version", absent)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f) is not cpu._CoreFinder])
    with pytest.raises(UserError, match="megatron-core is not installed"):
        cpu.install()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensor_model_parallel_size": 2}, ["tensor", "= 2", "processes, 3"]),
        ({"pipeline_model_parallel_size": 4}, ["= 4", "processes, 3"]),
        ({"expert_model_parallel_size": 2}, ["expert", "= 2", "processes, 3"]),
        ({"expert_tensor_parallel_size": 2}, ["expert-tensor", "= 2"]),
        ({"tensor_model_parallel_size": 0}, ["--tensor-model-parallel-size 0"]),
        ({"expert_model_parallel_size": -1}, ["--expert-model-parallel-size -1"]),
    ],
)
def test_sizes_that_do_not_divide_the_processes_are_user_errors(monkeypatch, sizes, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError) as caught:
        process_groups.initialize(ParallelConfig(**sizes))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_warnings_that_a_user_can_do_nothing_about_are_silenced_wherever_megatron_runs(recwarn):
    cpu.install()
    for module in ("megatron.core.optimizer", "torch.distributed.c10d_logger", "zeda_megatron.training.loop"):
        category = FutureWarning if "torch" in module else UserWarning
        warnings.warn_explicit(f"from {module}", category, "file.py", 1, module=module)
    assert [str(one.message) for one in recwarn] == ["from zeda_megatron.training.loop"]
