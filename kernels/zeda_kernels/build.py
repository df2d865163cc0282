"""Builds the CUDA kernels of `csrc` into one library: `python -m zeda_kernels.build`.

The same function serves `ZEDA_BUILD_KERNELS=1 pip install ./kernels` (setup.py), the build on first use and the compile
check. It needs nvcc and CUTLASS's headers, no GPU and no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker

NAME = "libzeda_kernels.so"
HERE = Path(__file__).resolve().parent
TARGETS = {
    "80": ("-gencode=arch=compute_80,code=[sm_80,compute_80]",),
    # wgmma exists under 90a alone, and its code runs on Hopper alone.
    "90a": ("-gencode=arch=compute_90a,code=sm_90a",),
}
"""nvcc's flags by architecture, as named in ZEDA_KERNEL_ARCHS."""
OWN = {"80": ("sm80",), "90a": ("sm90_wgrad", "sm90_rows")}
"""Sources of one architecture, each for every element type; `rows` and `api` belong to all."""
TYPES = {"bf16": (), "fp16": ("-DZK_FP16",)}


@dataclass(frozen=True)
class BuildOptions:
    """What to build."""

    archs: tuple[str, ...] = ("80", "90a")
    """Architectures; 80 also runs on newer GPUs that have no kernels of their own."""
    types: tuple[str, ...] = ("bf16",)
    """Element types; bf16 is always among them."""
    jobs: int = 1
    """Compilers at once; each takes up to 4 GB of memory."""
    source: Path = HERE / "csrc"
    """Folder with the CUDA sources."""

    @classmethod
    def from_environment(cls, **changes) -> BuildOptions:
        """ZEDA_KERNEL_ARCHS (`80;90a`), ZEDA_KERNEL_TYPES (`bf16;fp16`) and MAX_JOBS, then `changes`."""
        found = {
            field: tuple(os.environ[name].replace(",", ";").split(";"))
            for field, name in (("archs", "ZEDA_KERNEL_ARCHS"), ("types", "ZEDA_KERNEL_TYPES"))
            if os.environ.get(name)
        }
        if os.environ.get("MAX_JOBS", "").isdecimal():
            found["jobs"] = max(1, int(os.environ["MAX_JOBS"]))
        return cls(**{**found, **{k: v for k, v in changes.items() if v is not None}})

    def validate(self) -> None:
        """Raise `UserError` for what cannot be built."""
        for name, values, known in (
            ("ZEDA_KERNEL_ARCHS", self.archs, TARGETS),
            ("ZEDA_KERNEL_TYPES", self.types, TYPES),
        ):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise UserError(f"{name}: {unknown or 'nothing'} is unknown; choose from {', '.join(known)}")
        if "bf16" not in self.types:
            raise UserError("ZEDA_KERNEL_TYPES must hold bf16; write bf16;fp16")
        if not (self.source / "api.cu").is_file():
            raise UserError(f"{self.source} holds no CUDA sources: give --source the folder of api.cu")

    def key(self) -> str:
        """Name of this build in the cache: a hash of sources and options."""
        digest = hashlib.sha256(repr((sorted(self.archs), sorted(self.types))).encode())
        for path in sorted(self.source.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


def find_nvcc() -> str:
    """NVCC, then PATH, then CUDA_HOME. Raises `UserError` if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for path in (os.environ.get("NVCC"), shutil.which("nvcc"), str(Path(home) / "bin" / "nvcc")):
        if path and Path(path).is_file():
            return path
    raise UserError(
        "the kernels need nvcc of CUDA 12 or newer, which was not found: set NVCC, CUDA_HOME or PATH"
    )


def find_headers() -> tuple[Path, ...]:
    """Include folders of CUTLASS: CUTLASS_HOME, the checkout's third_party/cutlass, the wheel nvidia-cutlass."""
    spec = find_spec("cutlass_library")
    wheel = [Path(folder) / "source" for folder in (spec.submodule_search_locations if spec else None) or ()]
    home = os.environ.get("CUTLASS_HOME")
    for place in ([Path(home)] if home else []) + [HERE.parents[1] / "third_party" / "cutlass"] + wheel:
        if (place / "include" / "cutlass" / "cutlass.h").is_file():
            return place / "include", place / "tools" / "util" / "include"
        if home and place == Path(home):
            raise UserError(f"CUTLASS_HOME={home} holds no include/cutlass/cutlass.h")
    raise UserError(
        "the kernels need CUTLASS 4.2's headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_HOME"
    )


def commands(options: BuildOptions, nvcc: str, headers: tuple[Path, ...]) -> dict[str, list[str]]:
    """nvcc's command line for each object file, without the output."""
    common = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG", "-Xptxas=-v"]
    common += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-I{folder}" for folder in headers)]
    every = [flag for arch in options.archs for flag in TARGETS[arch]]
    built = [f"-DZK_SM{arch.rstrip('a')}" for arch in options.archs]
    built += ["-DZK_HALF"] if "fp16" in options.types else []
    units = {
        name: [*common, *every, *built, "-c", str(options.source / f"{name}.cu")] for name in ("rows", "api")
    }
    for arch in options.archs:
        for name in OWN[arch]:
            for kind in options.types:
                flags = [*TARGETS[arch], *TYPES[kind], "-c", str(options.source / f"{name}.cu")]
                units[f"{name}_{kind}"] = [*common, *flags]
    return units


def build(output: Path, options: BuildOptions, say=print) -> Path:
    """Compile and link; `output` appears only when complete.

    Args:
        output: the library to write. say: takes a line for each finished object.

    Raises:
        UserError: no nvcc, no headers, an unknown architecture, or a source that does not compile.
    """
    options.validate()
    nvcc, headers = find_nvcc(), find_headers()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zeda-kernels-", dir=output.parent) as scratch:
        folder = Path(scratch)
        units = commands(options, nvcc, headers)
        with ThreadPoolExecutor(options.jobs) as pool:
            tasks = [
                pool.submit(_run, [*line, "-o", str(folder / f"{name}.o")], name)
                for name, line in units.items()
            ]
            for name, task in zip(units, tasks):
                say(f"{name}: compiled{_registers(task.result())}")
        # Without the architectures nvcc adds a stub for its default one.
        every = [flag for arch in options.archs for flag in TARGETS[arch]]
        objects = [str(folder / f"{name}.o") for name in units]
        _run([nvcc, "-shared", "-cudart=static", *every, "-o", str(folder / NAME), *objects], "link")
        os.replace(folder / NAME, output)
    return output


def _run(line: list[str], what: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        wrong = [
            text for text in done.stderr.splitlines() if "error" in text.lower()
        ] or done.stderr.splitlines()
        raise UserError(f"{what}: nvcc failed: {' | '.join(wrong[:3])[:1500]}")
    return done.stdout + done.stderr


def _registers(log: str) -> str:
    used = [int(part.split()[0]) for part in log.split("Used ")[1:]]
    return f", at most {max(used)} registers" if used else ""


def cache_path(options: BuildOptions) -> Path:
    """Where a build of these sources is kept: ZEDA_KERNEL_CACHE, else the user's cache folder."""
    base = os.environ.get("ZEDA_KERNEL_CACHE")
    home = (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeda_megatron"
    )
    return home / "kernels" / options.key() / NAME


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m zeda_kernels.build`."""
    parser = argparse.ArgumentParser(
        prog="python -m zeda_kernels.build", description="Build the CUDA kernels", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="folder of the library (default: the build cache)")
    parser.add_argument("--arch", help="80;90a or one of them (default: ZEDA_KERNEL_ARCHS, else both)")
    parser.add_argument("--type", help="bf16 or bf16;fp16 (default: ZEDA_KERNEL_TYPES, else bf16)")
    parser.add_argument(
        "--jobs", "-j", type=int, help="compilers at once, 4 GB each (default: MAX_JOBS, else 1)"
    )
    parser.add_argument("--source", type=Path, help="folder of the sources (default: the package's)")
    parser.add_argument("--force", action="store_true", help="build even if the cache has it")
    args = parser.parse_args(argv)
    options = BuildOptions.from_environment(
        archs=tuple(args.arch.split(";")) if args.arch else None,
        types=tuple(args.type.split(";")) if args.type else None,
        jobs=args.jobs,
        source=args.source,
    )
    options.validate()
    output = args.out / NAME if args.out else cache_path(options)
    if args.out or args.force or not output.is_file():
        build(output, options, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(output)
    return 0


if __name__ == "__main__":
    run_worker(main)
