"""The doctor: facts about a machine, and the paths the code really takes there."""

import configparser
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zeda_megatron.errors import UserError
from zeda_megatron.models import build
from zeda_megatron.models.build import has_transformer_engine
from zeda_megatron.moe.experts import backend_for
from zeda_megatron.planning import doctor
from zeda_megatron.planning.doctor import OPTIONAL, REQUIRED, Machine, inspect, which_apex

ROOT = Path(__file__).resolve().parents[2]
GPU = ({"name": "invented", "compute_capability": "9.0", "memory_gib": 80.0},)


def machine(packages: tuple[str, ...] = (), gpus: tuple = (), apex: str = "absent") -> Machine:
    return Machine("3.11.0", dict.fromkeys(packages, "1.0"), (), apex, "13.0" if gpus else None, gpus)


def path_of(operator: str, on: Machine) -> str:
    return {route.operator: route.path for route in doctor.routes(on)}[operator]


def test_required_packages_are_those_of_the_metadata():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    wanted = metadata["options"]["install_requires"].strip().splitlines()
    wanted = [line for line in wanted if ";" not in line]  # triton comes with newer Pythons' Megatron
    assert sorted(REQUIRED) == sorted(wanted)


def test_versions_are_those_of_the_imported_packages():
    import transformers

    found = inspect()
    assert found.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.packages["transformers"] == transformers.__version__
    assert found.cuda == torch.version.cuda
    assert len(found.gpus) == torch.cuda.device_count()
    assert found.problems == ()


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("te", [False, True])
def test_paths_are_those_the_code_takes(monkeypatch, cuda, te):
    from importlib.machinery import ModuleSpec

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(build, "find_spec", lambda name: ModuleSpec(name, None) if te else None)
    on = machine(("transformer-engine",) if te else (), GPU if cuda else ())
    assert (path_of("attention", on) == "Transformer Engine") == has_transformer_engine()
    assert (path_of("norm", on) == "Transformer Engine") == has_transformer_engine()
    if not has_transformer_engine():
        assert path_of("experts", on) == backend_for("auto", torch.device("cpu"), torch.bfloat16)


def test_optimizer_here_is_the_one_megatron_imports():
    from megatron.core import optimizer

    here = path_of("optimizer", inspect())
    assert optimizer.Adam.__module__.split(".")[0] == {"torch AdamW": "torch"}.get(here, here.split()[0])


@pytest.mark.parametrize(
    ("packages", "apex", "path"),
    [
        (("transformer-engine",), "cuda", "Transformer Engine FusedAdam"),
        ((), "cuda", "apex FusedAdam"),
        ((), "other", "torch AdamW"),
        ((), "absent", "torch AdamW"),
    ],
)
def test_optimizer_on_a_gpu_follows_megatrons_order(packages, apex, path):
    assert path_of("optimizer", machine(packages, GPU, apex)) == path


def test_apex_of_nvidia_and_of_pypi_are_told_apart(tmp_path):
    def look(*files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return which_apex([str(folder)])

    nvidia = ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/optimizers/fused_adam.py")
    assert look("empty.txt") == "absent"
    assert look("apex/__init__.py", "apex/models.py", "apex/forms.py") == "other"
    assert look(*nvidia) == "python"
    assert look(*nvidia, "amp_C.py") == "cuda"


def test_no_extra_needed_to_examine_and_exit_code_is_0():
    """The command itself, as a user types it."""
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(OPTIONAL) <= set(found["packages"])
    assert set(found["routes"]) == {"backend", "attention", "norm", "experts", "permutation", "optimizer"}
    assert found["routes"]["backend"]["path"] == ("nccl" if torch.cuda.is_available() else "gloo")


def test_a_missing_requirement_is_one_clear_line_after_the_findings(monkeypatch, capsys):
    from zeda_megatron.planning import doctor as facts

    real = facts._version
    monkeypatch.setattr(facts, "_version", lambda name: None if name == "psutil" else real(name))
    with pytest.raises(UserError, match=r"psutil.*not installed.*pip install") as error:
        doctor.main([])
    assert "\n" not in str(error.value)
    assert "Path of each operator" in capsys.readouterr().out


def test_a_wrong_version_of_a_requirement_is_a_problem(monkeypatch):
    from zeda_megatron.planning import doctor as facts

    real = facts._version
    monkeypatch.setattr(facts, "_version", lambda name: "0.15.0" if name == "megatron-core" else real(name))
    assert inspect().problems == (f"{REQUIRED[0]} is required, 0.15.0 is installed",)


@pytest.mark.parametrize(("asked", "fine"), [(1, True), (2, False)])
def test_too_few_gpus_end_a_health_check_with_the_hosts_name(monkeypatch, capsys, asked, fine):
    monkeypatch.setattr(doctor, "inspect", lambda: machine(gpus=GPU))
    arguments = ["--brief", "--expect-gpus", str(asked)]
    if fine:
        assert doctor.main(arguments) == 0
        assert capsys.readouterr().out.endswith("1 x invented, 9.0, 80.0 GiB\n")
    else:
        with pytest.raises(UserError, match=rf"{socket.gethostname()}: torch sees 1 GPUs, not 2"):
            doctor.main(arguments)


def test_a_folder_that_cannot_be_written_ends_a_health_check(tmp_path, capsys):
    assert doctor.main(["--brief", "--writable", str(tmp_path / "new")]) == 0
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{socket.gethostname()}: .*file/in it cannot be written"):
        doctor.main(["--brief", "--writable", str(tmp_path / "file" / "in it")])
