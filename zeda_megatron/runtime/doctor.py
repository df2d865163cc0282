"""The doctor: which path each operator takes on this machine, and why.

The rules are those of the code they describe (named beside each); a test compares the two.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from ..errors import UserError
from .machine import Machine, inspect


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
    te = machine.has_gpu and machine.has("transformer-engine")  # models/layer_spec.py
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
    if te:
        return Route(
            "experts", "Transformer Engine, grouped GEMM", "Transformer Engine and a CUDA device found"
        )
    if machine.has_gpu and machine.kernels and _ampere(machine):
        return Route("experts", "kernels", "this project's kernels found; for --bf16 (fp32: grouped_mm)")
    return Route(
        "experts",
        "grouped_mm",
        "torch's grouped GEMM: "
        + ("no CUDA device needed" if not machine.has_gpu else "no Transformer Engine")
        + ("" if machine.kernels else "; this project's kernels are not built (kernels/README.md)"),
    )


def _ampere(machine: Machine) -> bool:
    return int(machine.gpus[0]["compute_capability"].split(".")[0]) >= 8


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
    gpus = [f"{g['name']}, {g['compute_capability']}, {g['memory_gib']} GiB" for g in machine.gpus]
    facts = {
        "python": machine.python,
        "CUDA of torch": machine.cuda or "- (CPU build)",
        "GPU": f"{len(gpus)} x {gpus[0]}" if gpus else "-",
        "nvcc": machine.nvcc or "-",
        "kernels": machine.kernels or "-",
        **{name: version or "-" for name, version in machine.packages.items()},
        "apex": APEX[machine.apex],
    }
    found = [f"  {name:20}{value}" for name, value in facts.items()]
    paths = [f"  {r.operator:14}{r.path:34}{r.why}" for r in routes(machine)]
    return "\n".join(["Installed (- is absent)", *found, "", "Path of each operator", *paths])


def main(argv: list[str] | None = None) -> int:
    """Entry point of tools/doctor.py. Raises `UserError` if something required is missing."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description="What is installed; which path operators take"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    machine = inspect()
    text = json.dumps(examination(machine), indent=2) if args.json else format_examination(machine)
    print(text, flush=True)
    if machine.problems:
        shown = "; ".join(machine.problems[:3])
        more = len(machine.problems) - 3
        raise UserError(
            f"{shown}{f'; and {more} more' if more > 0 else ''}: run pip install -e . in this folder"
        )
    return 0
