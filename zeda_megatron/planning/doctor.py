"""The doctor: which path each operator takes on this machine, and why.

The rules are those of the code they describe (named beside each); a test compares the two.
What the machine has (packages, CUDA, compilers) is looked up without torch and anything else that is heavy.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import UserError
from ..ops import expert_kernels
from ..text_table import text_table

REQUIRED = (
    "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
    "torch>=2.9",
    "transformers>=5.0,<6",
    "safetensors>=0.5",
    "datasets>=3.0",
    "sentencepiece>=0.2",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "tensorboard>=2.17",
    "tqdm>=4.66",
)
OPTIONAL = (
    "transformer-engine",
    "nvidia-modelopt",
    "flash-attn",
    "nvidia-cutlass",
    "vllm",
    "accelerate",
    "zeda_kernels",
)


@dataclass(frozen=True)
class Machine:
    """Facts the doctor decides on."""

    python: str
    packages: dict[str, str | None]
    """Version by distribution name; None where it is not installed."""
    problems: tuple[str, ...]
    """One line for each required package that is missing or of a version that will not do."""
    apex: str
    """`absent`, `cuda` (NVIDIA's with CUDA extensions), `python` (NVIDIA's without) or `other` (PyPI's)."""
    cuda: str | None
    """CUDA version torch was built for; None for a CPU build."""
    gpus: tuple[dict, ...] = ()
    """Name, compute capability and memory of each visible GPU."""
    nvcc: str | None = None
    """Version of the CUDA compiler on this machine."""
    kernels: str | None = None
    """Library of this project's kernels; None if they are not installed or not built."""
    kernels_problem: str | None = None
    """What keeps them from running on the first GPU in bf16."""

    @property
    def has_gpu(self) -> bool:
        return bool(self.gpus)

    def has(self, package: str) -> bool:
        return self.packages.get(package) is not None


def inspect() -> Machine:
    """Look at this machine."""
    names = [_name(line) for line in REQUIRED] + list(OPTIONAL)
    packages = {name: _version(name) for name in names}
    cuda, gpus = _torch_cuda()
    problems = [_problem(line, packages[_name(line)]) for line in REQUIRED]
    try:
        found = expert_kernels.find()
        kernels = found.library() if found else None
        wrong = _why_not(found) if kernels and gpus else None
    except UserError as error:
        kernels, wrong, problems = None, None, [*problems, str(error)]
    return Machine(
        python=platform.python_version(),
        packages=packages,
        problems=tuple(filter(None, problems)),
        apex=which_apex(),
        cuda=cuda,
        gpus=gpus,
        nvcc=_nvcc(),
        kernels=str(kernels) if kernels else None,
        kernels_problem=wrong,
    )


def which_apex(path: list[str] | None = None) -> str:
    """Tell NVIDIA's apex from the unrelated package of that name on PyPI, without importing either.

    `path` is where to look (default: `sys.path`). NVIDIA's has `apex/optimizers/fused_adam.py`; its CUDA
    extensions are top-level modules, `amp_C` among them.
    """
    spec = PathFinder.find_spec("apex", path)
    if spec is None:
        return "absent"
    folders = spec.submodule_search_locations or []
    if not any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "other"
    return "cuda" if PathFinder.find_spec("amp_C", path) else "python"


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~]", requirement, maxsplit=1)[0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _problem(requirement: str, found: str | None) -> str | None:
    if found is None:
        return f"{requirement} is required and not installed"
    try:
        requirements = importlib.import_module("packaging.requirements")
    except ImportError:
        return None  # versions cannot be compared; pip did so at installation
    if requirements.Requirement(requirement).specifier.contains(found, prereleases=True):
        return None
    return f"{requirement} is required, {found} is installed"


def _why_not(kernels: expert_kernels.ExpertKernels) -> str | None:
    import torch

    return kernels.why_not(torch.device("cuda", 0), torch.bfloat16)


def _torch_cuda() -> tuple[str | None, tuple[dict, ...]]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None, ()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": props.name,
                    "compute_capability": f"{props.major}.{props.minor}",
                    "memory_gib": round(props.total_memory / 2**30, 1),
                }
            )
    return torch.version.cuda, tuple(gpus)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = (os.environ.get("NVCC"), shutil.which("nvcc"), str(Path(home) / "bin" / "nvcc"))
    for path in candidates:
        if path and Path(path).is_file():
            try:
                text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
            except (OSError, subprocess.SubprocessError):
                continue
            found = re.search(r"release ([\d.]+)", text)
            return found.group(1) if found else "unknown version"
    return None


@dataclass(frozen=True)
class Route:
    """The path of one operator."""

    operator: str
    path: str
    """What runs."""
    why: str
    """What decided it, and how to get the faster path where there is one."""


def routes(machine: Machine) -> list[Route]:
    """The path of every operator that has more than one."""
    te = machine.has_gpu and machine.has("transformer-engine")  # models/build.py
    no_te = (
        "torch sees no CUDA device"
        if not machine.has_gpu
        else "Transformer Engine is not installed: extra te"
    )
    return [
        Route(
            "backend",
            *(("nccl", "CUDA device found") if machine.has_gpu else ("gloo", "torch sees no CUDA device")),
        ),
        Route("attention", "Transformer Engine" if te else "torch SDPA", _why(te, no_te)),
        Route("norm", "Transformer Engine" if te else "torch RMSNorm", _why(te, no_te)),
        _experts(machine, te),
        Route(
            "permutation",
            "Megatron-Core, unfused",  # models/build.py
            "the default; --moe-permute-fusion takes Transformer Engine's fused one" if te else no_te,
        ),
        _optimizer(machine),
    ]


def _why(te: bool, otherwise: str) -> str:
    return "Transformer Engine and a CUDA device found" if te else otherwise


def _experts(machine: Machine, te: bool) -> Route:
    # models/build.py switches Megatron's grouped GEMM on with TE; otherwise moe/experts.py chooses.
    missing = _kernels_missing(machine)
    if te:
        other = (
            f"this project's are not taken: {missing}"
            if missing
            else "--expert-backend kernels takes this project's"
        )
        return Route(
            "experts",
            "Transformer Engine, grouped GEMM",
            f"Transformer Engine and a CUDA device found; {other}",
        )
    if not missing:
        return Route("experts", "kernels", "this project's kernels found; for --bf16 (fp32: grouped_mm)")
    return Route("experts", "grouped_mm", f"torch's grouped GEMM; not this project's kernels: {missing}")


def _kernels_missing(machine: Machine) -> str | None:
    """What keeps this project's kernels from running, or None."""
    if not machine.has("zeda_kernels"):
        return "not installed (kernels/README.md)"
    if not machine.kernels:
        return "not built (kernels/README.md)"
    return machine.kernels_problem if machine.has_gpu else "no CUDA device"


def _optimizer(machine: Machine) -> Route:
    # megatron/core/optimizer/__init__.py: Transformer Engine, then apex, then torch.
    if not machine.has_gpu:
        return Route("optimizer", "torch AdamW", "torch sees no CUDA device")
    if machine.has("transformer-engine"):
        return Route("optimizer", "Transformer Engine FusedAdam", "Transformer Engine found")
    if machine.apex == "cuda":
        return Route("optimizer", "apex FusedAdam", "NVIDIA's apex with CUDA extensions found")
    if machine.apex == "python":
        return Route(
            "optimizer",
            "apex FusedAdam, which will fail",
            "NVIDIA's apex was built without CUDA extensions: rebuild it (CONTRIBUTING.md) or uninstall it",
        )
    return Route("optimizer", "torch AdamW", "neither Transformer Engine nor NVIDIA's apex (CONTRIBUTING.md)")


APEX = {
    "absent": "-",
    "cuda": "NVIDIA's, with CUDA extensions",
    "python": "NVIDIA's, without CUDA extensions: FusedAdam cannot work",
    "other": "not NVIDIA's: PyPI's unrelated package; pip uninstall apex (see CONTRIBUTING.md)",
}


def examination(machine: Machine) -> dict:
    """Facts, routes and problems as a JSON-ready dict."""
    return {
        "python": machine.python,
        "packages": machine.packages,
        "apex": machine.apex,
        "cuda": machine.cuda,
        "gpus": list(machine.gpus),
        "nvcc": machine.nvcc,
        "kernels": machine.kernels,
        "routes": {route.operator: asdict(route) for route in routes(machine)},
        "problems": list(machine.problems),
    }


def format_examination(machine: Machine) -> str:
    """The same for the terminal."""
    facts = {
        "python": machine.python,
        "CUDA of torch": machine.cuda or "- (CPU build)",
        "GPU": _gpus(machine) if machine.has_gpu else "-",
        "nvcc": machine.nvcc or "-",
        "kernels": machine.kernels or "-",
        **{name: version or "-" for name, version in machine.packages.items()},
        "apex": APEX[machine.apex],
    }
    found = text_table([*facts.items()], "ll", "  ")
    paths = text_table([(r.operator, r.path, r.why) for r in routes(machine)], "lll", "  ")
    return "\n".join(["Installed (- is absent)", *found, "", "Path of each operator", *paths])


def _gpus(machine: Machine) -> str:
    if not machine.has_gpu:
        return "no GPU"
    first = machine.gpus[0]
    return f"{len(machine.gpus)} x {first['name']}, {first['compute_capability']}, {first['memory_gib']} GiB"


def _write_in(folder: Path) -> None:
    """Raises `UserError` naming this host if no file can be written into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{socket.gethostname()}: {folder} cannot be written ({error.strerror})") from error


def main(argv: list[str]) -> int:
    """Entry point of zeda doctor. Raises `UserError` if something required or expected is missing."""
    parser = argparse.ArgumentParser(
        prog="zeda doctor", description="What is installed; which path operators take", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--brief", action="store_true", help="print one line")
    parser.add_argument("--expect-gpus", type=int, default=0, metavar="N", help="fail if torch sees fewer")
    parser.add_argument("--writable", metavar="DIR", help="fail if no file can be written there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    machine = inspect()
    if args.brief:
        text = f"{socket.gethostname()}: python {machine.python}, {_gpus(machine)}"
    else:
        text = json.dumps(examination(machine), indent=2) if args.json else format_examination(machine)
    print(text, flush=True)
    if machine.problems:
        shown = "; ".join(machine.problems[:3])
        more = len(machine.problems) - 3
        raise UserError(
            f"{shown}{f'; and {more} more' if more > 0 else ''}: run pip install -e . in this folder"
        )
    if len(machine.gpus) < args.expect_gpus:
        raise UserError(
            f"{socket.gethostname()}: torch sees {len(machine.gpus)} GPUs, not {args.expect_gpus}: leave this host "
            "out, or ask for GPUs"
        )
    if args.writable:
        _write_in(Path(args.writable))
    return 0
