"""The build of the kernels: its errors, its cache, where its library is found; and, opt-in, what nvcc makes of it."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from zeda_kernels import build, cuda_kernels, kernel_call, kernel_library
from zeda_kernels.build import BuildOptions
from zeda_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
FAKE_NVCC = """#!/bin/sh
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
echo "ptxas info    : Used 168 registers, used 2 barriers" >&2
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler that makes empty files and writes down its command lines, and headers that are none."""
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    (tmp_path / "nvcc").write_text(FAKE_NVCC.format(log=tmp_path / "log"))
    (tmp_path / "nvcc").chmod(0o755)
    header = tmp_path / "cutlass" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setenv("CUTLASS_HOME", str(tmp_path / "cutlass"))
    monkeypatch.setenv("ZEDA_KERNEL_CACHE", str(tmp_path / "cache"))
    for name in ("ZEDA_KERNELS_SO", "ZEDA_JIT_KERNELS", "ZEDA_KERNEL_ARCHS", "ZEDA_KERNEL_TYPES", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_unit_is_compiled_for_its_architecture_and_linked_once(fake):
    said = []
    output = build.build(fake / "out" / build.NAME, BuildOptions(types=("bf16", "fp16")), said.append)
    lines = (fake / "log").read_text().splitlines()
    assert output.is_file() and os.listdir(output.parent) == [build.NAME]
    compiled = {Path(line.split(" -o ")[1]).stem: line for line in lines if " -c " in line}
    names = ("sm80", "sm90_wgrad", "sm90_rows")
    assert set(compiled) == {"rows", "api"} | {
        f"{name}_{kind}" for name in names for kind in ("bf16", "fp16")
    }
    for name, line in compiled.items():
        assert ("compute_90a,code=sm_90a" in line) == (not name.startswith("sm80"))
        assert ("compute_80" in line) == (not name.startswith("sm90"))
        assert ("-DZK_FP16" in line) == name.endswith("fp16")
    assert "-DZK_SM80 -DZK_SM90 -DZK_HALF" in compiled["api"]
    linked = {Path(part).stem for part in lines[-1].split() if part.endswith(".o")}
    assert linked == set(compiled) and "-shared" in lines[-1]
    assert said[0] == "rows: compiled, at most 168 registers"


def test_one_architecture_compiles_its_own_units_alone(fake, monkeypatch):
    monkeypatch.setenv("ZEDA_KERNEL_ARCHS", "80")
    monkeypatch.setenv("MAX_JOBS", "3")
    options = BuildOptions.from_environment()
    assert options == BuildOptions(archs=("80",), jobs=3)
    assert list(build.commands(options, "nvcc", ())) == ["rows", "api", "sm80_bf16"]


def test_a_finished_build_is_found_in_the_cache_and_not_repeated(fake, capsys):
    assert kernel_library.find() is None
    assert build.main([]) == 0
    first = (fake / "log").read_text()
    assert build.main([]) == 0
    assert (fake / "log").read_text() == first
    found = kernel_library.find()
    assert capsys.readouterr().out.split() == [str(found)] * 2 and found.is_relative_to(fake / "cache")


def test_other_sources_are_another_build(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(BuildOptions().source, tmp_path / name)
    same = [BuildOptions(source=tmp_path / name).key() for name in ("a", "b")]
    assert same[0] == same[1] == BuildOptions().key()
    (tmp_path / "b" / "index.h").write_text("// other\n")
    assert BuildOptions(source=tmp_path / "b").key() != same[0]
    assert BuildOptions(types=("bf16", "fp16")).key() != same[0]


def test_the_named_library_comes_first_then_the_packages_then_a_build_on_first_use(fake, monkeypatch):
    monkeypatch.setenv("ZEDA_JIT_KERNELS", "1")
    assert kernel_library.find() == build.cache_path(BuildOptions())
    package = fake / "package" / build.NAME
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(kernel_library, "__file__", str(package.with_name("kernel_library.py")))
    assert kernel_library.find() == package
    named = fake / "mine.so"
    monkeypatch.setenv("ZEDA_KERNELS_SO", str(named))
    with pytest.raises(UserError, match=r"mine\.so does not exist"):
        kernel_library.find()
    named.touch()
    assert kernel_library.find() == named
    with pytest.raises(UserError, match=r"mine\.so is no library of these kernels"):
        kernel_library.load(named)


def test_what_is_missing_is_said_in_one_line(fake, monkeypatch):
    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            build.build(fake / "x.so", BuildOptions(**options))
        assert not (fake / "x.so").exists()

    refused("ZEDA_KERNEL_ARCHS: .'70'", archs=("70",))
    refused("must hold bf16", types=("fp16",))
    refused("holds no CUDA sources", source=fake)
    (fake / "nvcc").write_text("#!/bin/sh\necho 'rows.cu(7): error: expected a ;' >&2\nexit 2\n")
    refused(r"rows: nvcc failed: rows.cu\(7\): error")
    monkeypatch.setenv("CUTLASS_HOME", str(fake / "nowhere"))
    refused("CUTLASS_HOME=.*nowhere holds no")
    monkeypatch.delenv("CUTLASS_HOME")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "HERE", fake / "kernels" / "zeda_kernels")
    refused("pip install --no-deps nvidia-cutlass")
    monkeypatch.setenv("NVCC", "")
    monkeypatch.setenv("PATH", str(fake / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(fake))
    refused("need nvcc")


def test_asked_for_kernels_an_installation_without_nvcc_says_so(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so", "build"))
    (tmp_path / "zeda_megatron").mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "zeda_megatron" / name, tmp_path / "zeda_megatron")
    here = {"NVCC": "", "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "ZEDA_BUILD_KERNELS": "1"}
    line = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    done = subprocess.run(
        line, cwd=tmp_path / "kernels", capture_output=True, text=True, env=os.environ | here
    )
    assert done.returncode != 0 and "error: ZEDA_BUILD_KERNELS=1: the kernels need nvcc" in done.stderr


def test_argument_types_are_those_of_the_header():
    text = re.sub(r"//.*", "", (BuildOptions().source / "api.h").read_text())
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    found = {}
    for result, name, arguments in re.findall(r"ZK_API (\w+) (\w+)\(([^)]*)\);", text):
        types = [part.strip() for part in arguments.split(",") if part.strip()]
        found[name] = (
            kinds[result],
            tuple(ctypes.c_void_p if "*" in part else kinds[part.split()[0]] for part in types),
        )
    assert found == kernel_library._SIGNATURES


def test_the_tile_follows_the_rows_per_expert_unless_one_is_named(monkeypatch):
    assert [cuda_kernels.tile_for(rows, 128) for rows in (0, 128 * 111, 128 * 112)] == [0, 0, 1]
    for i, name in enumerate(cuda_kernels.TILES):
        monkeypatch.setenv("ZEDA_KERNEL_TILE", name)
        assert [cuda_kernels.tile_for(rows, 128) for rows in (0, 128 * 200)] == [i, i]
    monkeypatch.setenv("ZEDA_KERNEL_TILE", "huge")
    with pytest.raises(UserError, match=r"ZEDA_KERNEL_TILE=huge: choose from small, large"):
        cuda_kernels.tile_for(1, 1)


def test_why_the_kernels_cannot_run_is_told(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(kernel_call, "library", lambda: None)
    assert "not built: python -m" in kernel_call.why_not(gpu, torch.bfloat16)
    probe = [0]
    both = {"zk_built": staticmethod(lambda: 3), "zk_probe": staticmethod(lambda: probe[0])}
    functions = type("Functions", (), both)
    made = kernel_library.KernelLibrary(Path("x"), functions)
    monkeypatch.setattr(kernel_call, "library", lambda: made)
    assert "capability 7.5" in kernel_call.why_not(gpu, torch.bfloat16)
    assert "float32" in kernel_call.why_not(gpu, torch.float32)
    assert "float16" in kernel_call.why_not(gpu, torch.float16)
    found = [made.arch_for(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (7, 5))]
    assert found == [80, 80, 90, None, 80, None]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernel_call.why_not(gpu, torch.bfloat16) is None
    probe[0] = 35
    assert "x: the driver is older than the CUDA runtime" in kernel_call.why_not(gpu, torch.bfloat16)


def test_multiprocessors_are_left_to_communication(monkeypatch):
    monkeypatch.setattr(
        kernel_call, "built_library", lambda: type("L", (), {"arch_for": lambda self, c: 90})()
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    facts = type("Facts", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    ask = kernel_call.device_facts.__wrapped__
    assert ask(0) == (90, 132)
    monkeypatch.setenv("ZEDA_KERNEL_SM_MARGIN", "20")
    assert ask(0) == (90, 112)
    for told, message in (("132", "the GPU has 132"), ("-1", "whole number from 0")):
        monkeypatch.setenv("ZEDA_KERNEL_SM_MARGIN", told)
        with pytest.raises(UserError, match=f"ZEDA_KERNEL_SM_MARGIN={told}: .*{message}"):
            ask(0)


# What nvcc makes of the sources: minutes, and only where nvcc and the headers are.


@pytest.fixture(scope="module")
def compiled():
    """The library of this checkout, built unless the cache or ZEDA_KERNELS_SO has it."""
    try:
        options = BuildOptions.from_environment()
        path = kernel_library.find() or build.build(build.cache_path(options), options)
    except UserError as error:
        if "need" in str(error):
            pytest.skip(str(error))
        raise
    return kernel_library.load(path)


DERIVATIVE = "4rowsILi4E"
"""In the names of the kernels with SwiGLU's derivative."""


def disassemble(library, *flags: str) -> str:
    """cuobjdump, from the toolkit or the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    spec = find_spec("nvidia")
    wheels = [
        str(path)
        for place in (spec.submodule_search_locations if spec else ())
        for path in Path(place).glob("*/bin")
    ]
    path = os.pathsep.join([*wheels, str(Path(build.find_nvcc()).parent), os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    line = [tool, *flags, str(library.path)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hopper_kernels_use_its_tensor_cores_and_memory_engine_and_spill_nothing(compiled):
    code = disassemble(compiled, "-sass", "-arch", "sm_90a").split("Function : ")[1:]
    products = [text for text in code if "HGMMA" in text]
    kinds = 2 if compiled.has_half else 1
    # Forward, dgrad, both with SwiGLU, in two tiles each, wgrad.
    assert len(products) == 9 * kinds
    assert all("UTMALDG" in text for text in products)
    rows = [text for text in products if "UTMASTG" not in text and "STSM" in text]
    assert len(rows) == 8 * kinds and sum("MUFU.EX2" in text for text in rows) == 4 * kinds
    assert sum("UTMALDG.2D.MULTICAST" in text for text in rows) == 4 * kinds  # the large tiles
    spilling = [text.split()[0] for text in code if re.search(r"\b(LDL|STL)\b", text)]
    assert all(DERIVATIVE in name for name in spilling), spilling


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hopper_kernels_fit_their_registers(compiled):
    usage = disassemble(compiled, "-res-usage", "-arch", "sm_90a")
    used = [
        tuple(map(int, found)) for found in re.findall(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    ]
    assert len(used) >= 9
    assert max(registers for registers, _ in used) <= 168 and not any(local for _, local in used)
    # Addresses that are needed again after the epilogue of SwiGLU's derivative; nothing in a main loop.
    stacks = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage)
    assert all(int(size) <= (80 if DERIVATIVE in name else 0) for name, size in stacks)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_warpgroups_together_take_no_more_registers_than_the_launch_gives_them(compiled):
    """Else the first launch waits for ever: no warpgroup gives back what another asks for."""
    code = disassemble(compiled, "-sass", "-arch", "sm_90a").split("Function : ")[1:]
    usage = disassemble(compiled, "-res-usage", "-arch", "sm_90a")
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    checked = 0
    for text in code:
        given = [int(n, 16) for n in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL 0x([0-9a-f]+)", text)]
        asked = [int(n, 16) for n in re.findall(r"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP\d, 0x([0-9a-f]+)", text)]
        if not asked:
            continue
        # One warpgroup loads and gives back, two multiply.
        assert len(set(given)) == len(set(asked)) == 1
        assert given[0] + 2 * asked[0] <= 3 * int(registers[text.split()[0]]), text.splitlines()[0]
        checked += 1
    assert checked == 5 * (2 if compiled.has_half else 1)  # the large tiles, and wgrad


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_products_of_rows_find_their_operands_where_the_memory_engine_writes_them(tmp_path):
    try:
        nvcc, headers = build.find_nvcc(), build.find_headers()
    except UserError as error:
        pytest.skip(str(error))
    line = build.commands(BuildOptions(archs=("90a",)), nvcc, headers)["sm90_rows_bf16"]
    source, program = Path(__file__).parent / "cute" / "rows_layouts.cu", tmp_path / "layouts"
    sources = BuildOptions().source
    done = subprocess.run(
        [*line[:-2], f"-I{sources}", str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert subprocess.run([program], capture_output=True, text=True).stdout == "0 0\n" * 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_without_a_driver_every_launcher_returns_an_error_code(compiled):
    memory = torch.zeros(1 << 20)
    at = memory.data_ptr() + (-memory.data_ptr()) % 256
    table = ctypes.cast((ctypes.c_void_p * 2)(at, at), ctypes.c_void_p)
    c = compiled.functions
    for product, arch in [(p, a) for p in range(3) for a in compiled.archs if a == 80 or p == 2]:
        choice = (product, 0, arch, 2, 8, 64, 64)
        size = c.zk_grouped_workspace(*choice, 132)
        assert 0 < size < 1 << 20
        rest = (at, at, at, at, table, 0.0, at)
        assert c.zk_grouped(*choice, *rest, size, 132, None) not in (0, -1, -2, -3, -4)
        assert c.zk_grouped(*choice, *rest, size - 1, 132, None) == -2
        assert c.zk_grouped(*choice[:5], 60, 64, *rest, size, 132, None) == -3
    if 90 in compiled.archs:
        assert c.zk_grouped_workspace(0, 0, 90, 2, 8, 64, 64, 132) == -4
        assert c.zk_maps(0, 2, 64, 64, table, at) not in (0, -1, -2, -3, -4)
        assert c.zk_maps(0, 2, 60, 64, table, at) == -3
        for product, tile, pre in [(p, t, pre) for p in (0, 1, 3, 4) for t in (0, 1) for pre in (at, None)]:
            if product == 4 and pre is None:
                continue
            operands = (at, at, at, None, pre, at, at, at, 132, None)
            assert c.zk_rows(product, 0, tile, 2, 2, 8, 64, 64, *operands) not in (0, -1, -2, -3, -4)
            assert c.zk_rows(product, 0, tile, 2, 2, 8, 60, 64, *operands) == -3
            assert c.zk_rows(product, 0, tile, 2, 1025, 8, 64, 64, *operands) == -1
            assert c.zk_rows(product, 0, tile, 4, 2, 8, 64, 64, *operands) == -1
        assert c.zk_rows(2, 0, 0, 2, 2, 8, 64, 64, *operands) == -1
    assert c.zk_probe() not in (0, -1)
    unknown = (0, 1 - compiled.has_half, 70, 2, 8, 64, 64, at, at, at, at, table, 0.0, at, 1, 1, None)
    assert c.zk_grouped(*unknown) == -4
    for code in (
        c.zk_swiglu(0, 1, 8, 8, at, at, at, at, 1, None),
        c.zk_swiglu_grad(0, 1, 8, 8, at, at, at, at, at, at, at, 1, None),
        c.zk_zero_tail(1, 8, 16, at, at, 1, None),
    ):
        assert code > 0
