"""What a machine has: packages, CUDA, compilers. Works without torch, imports nothing else that is heavy."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import UserError
from ..ops import expert_kernels

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
    except UserError as error:
        kernels, problems = None, [*problems, str(error)]
    return Machine(
        python=platform.python_version(),
        packages=packages,
        problems=tuple(filter(None, problems)),
        apex=which_apex(),
        cuda=cuda,
        gpus=gpus,
        nvcc=_nvcc(),
        kernels=str(kernels) if kernels else None,
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
