"""The CUDA kernels without tensor cores, compiled by g++ and run on the CPU: against the reference,
with sizes around every block and chunk. The tests bring a small stand-in for CUDA (`emulated/`).
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from groups import Draw, ends_of

from zeda_kernels import kernel_library, reference
from zeda_kernels.build import BuildOptions

HERE = Path(__file__).parent
SOURCES = BuildOptions().source
KINDS = {0: torch.bfloat16, 1: torch.float32}
"""Element type by dtype code; the stand-in's half is a float."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    output = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    folders = [f"-I{HERE / 'emulated'}", f"-I{SOURCES}"]
    line = [compiler, *flags, *folders, str(HERE / "emulated" / "library.cpp"), "-o", str(output)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(output))
    for name, (result, arguments) in kernel_library._SIGNATURES.items():
        if not name.startswith(("zk_grouped", "zk_rows", "zk_maps", "zk_tiles", "zk_built", "zk_probe")):
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    for name in ("tiles_of", "tail_of"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def poison(*shape, dtype):
    return (
        torch.full(shape, 77, dtype=dtype)
        if dtype == torch.int32
        else torch.full(shape, float("nan"), dtype=dtype)
    )


def near(mine, expected, dtype):
    torch.testing.assert_close(
        mine,
        expected,
        rtol=0.02 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


@pytest.mark.parametrize("code", KINDS)
@pytest.mark.parametrize(("counts", "extra"), [([3, 0, 2], 2), ([0, 0], 3), ([0, 1, 0, 40], 0)])
@pytest.mark.parametrize("width", [8, 2056])
def test_swiglu_and_its_gradient(kernels, code, counts, extra, width):
    kind, rows = KINDS[code], sum(counts) + extra
    draw = Draw(dtype=kind)
    pre, dact, probs, ends = draw(rows, 2 * width), draw(rows, width), draw(rows).float(), ends_of(counts)
    pre[sum(counts) :] = float("nan")
    for weights in (probs, None):
        at = weights.data_ptr() if weights is not None else None
        act, again, dpre = (poison(rows, n, dtype=kind) for n in (width, width, 2 * width))
        dprobs = poison(rows, dtype=torch.float32)
        sizes = (code, len(counts), rows, width, ends.data_ptr())
        assert kernels.zk_swiglu(*sizes, pre.data_ptr(), at, act.data_ptr(), 1, None) == 0
        near(act, reference.swiglu(pre, weights, ends), kind)
        pointers = (dact.data_ptr(), pre.data_ptr(), at, dpre.data_ptr(), again.data_ptr(), dprobs.data_ptr())
        assert kernels.zk_swiglu_grad(*sizes, *pointers, 2, None) == 0
        expected = reference.swiglu_backward(dact, pre, weights, ends)
        near(dpre, expected[0], kind)
        near(dprobs, expected[2], torch.float32 if width == 8 else kind)
        assert torch.equal(again, act)


@pytest.mark.parametrize("ends", [[2, 5], [0, 0], [9, 12], [5, 3], [-2, -1]])
def test_the_tail_alone_is_cleared(kernels, ends):
    ends, data = torch.tensor(ends, dtype=torch.int32), torch.ones(6, 8)
    tail = reference.spans(ends, 6)[-1][1]
    assert kernels.tail_of(ctypes.c_void_p(ends.data_ptr()), 2, ctypes.c_int64(6)) == tail
    assert kernels.zk_zero_tail(2, 6, 32, ends.data_ptr(), data.data_ptr(), 2, None) == 0
    assert data[:tail].all() and not data[tail:].any()


def prepared(kernels, product, counts, n, k, beta=0.0, extra=3):
    """Arguments of each group's GEMM as the kernel writes them, and the arrays behind the pointers."""
    rows, groups, ends = sum(counts) + extra, len(counts), ends_of(counts)
    a = torch.zeros(rows, k if product == 0 else n, dtype=torch.bfloat16)
    b, d = (
        torch.zeros(rows, k, dtype=torch.bfloat16),
        torch.zeros(rows, n if product == 0 else k, dtype=torch.bfloat16),
    )
    experts = [torch.full((n, k), 5.0) for _ in range(groups)]
    table = (ctypes.c_void_p * groups)(*[expert.data_ptr() for expert in experts])
    out = torch.zeros(9, groups, dtype=torch.int64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (ends, a, b, d)]
    code = kernels.prepare_arrays(
        product,
        groups,
        ctypes.c_int64(rows),
        n,
        k,
        *pointers,
        table,
        ctypes.c_float(beta),
        2,
        4 if product == 2 else 2,
        ctypes.c_void_p(out.data_ptr()),
    )
    assert code == 0
    return out[:3].reshape(-1, 3), out[3:], (a, b, d, experts)


@pytest.mark.parametrize("groups", [1, 31, 32, 33, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("product", [0, 1, 2])
def test_arguments_of_every_groups_gemm(kernels, product, groups):
    n, k = 24, 16
    counts = [(e * 37) % 5 for e in range(groups)]  # every fifth is empty
    shapes, (at_a, at_b, at_d, lda, ldb, ldd), (a, b, d, experts) = prepared(kernels, product, counts, n, k)
    starts = [sum(counts[:e]) for e in range(groups)]
    for e, (count, start) in enumerate(zip(counts, starts)):
        own = experts[e].data_ptr()
        expected = {
            0: ((count, n, k), a[start:].data_ptr(), own, d[start:].data_ptr(), k, k, n),
            1: ((count, k, n), a[start:].data_ptr(), own, d[start:].data_ptr(), n, k, k),
            2: ((n if count else 0, k, count), a[start:].data_ptr(), b[start:].data_ptr(), own, n, k, k),
        }[product]
        found = (tuple(shapes[e].tolist()), *(int(x[e]) for x in (at_a, at_b, at_d, lda, ldb, ldd)))
        assert found == expected, e
        cleared = product == 2 and count == 0
        assert bool((experts[e] == (0 if cleared else 5)).all())


def test_accumulating_leaves_the_gradients_of_empty_groups_alone(kernels):
    *_, experts = prepared(kernels, 2, [0, 3, 0], 8, 8, beta=1.0)[2]
    assert all((expert == 5).all() for expert in experts)


def test_the_groups_outputs_cover_each_element_once(kernels):
    counts, n, k = [0, 130, 1, 0, 64], 40, 16
    shapes, (_, _, at_d, _, _, ldd), (_, _, d, _) = prepared(kernels, 0, counts, n, k)
    times = torch.zeros(d.shape, dtype=torch.int64)
    for (m, width, _), start, ld in zip(shapes.tolist(), at_d.tolist(), ldd.tolist()):
        first = (start - d.data_ptr()) // 2
        index = first + torch.arange(m)[:, None] * ld + torch.arange(width)
        times.view(-1).index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.int64))
    assert (times[: sum(counts)] == 1).all() and not times[sum(counts) :].any()


def test_tiles_cover_a_group_with_whole_clusters(kernels):
    for m, n, tile_m, tile_n, cluster in [
        (0, 8, 64, 128, 1),
        (1, 8, 64, 128, 1),
        (128, 256, 128, 256, 2),
        (129, 257, 128, 256, 2),
    ]:
        down, across = -(-m // tile_m), -(-n // tile_n)
        assert kernels.tiles_of(m, n, tile_m, tile_n, cluster) == -(-down // cluster) * cluster * across


def test_bad_sizes_give_an_error_code(kernels):
    x = torch.zeros(8, 8)
    at = x.data_ptr()
    assert kernels.zk_swiglu(0, 1, 1, 12, at, at, None, at, 1, None) == -3  # not a multiple of 8
    assert kernels.zk_swiglu(0, 1, 1, 8, at, at + 4, None, at, 1, None) == -3
    assert kernels.zk_swiglu(7, 1, 1, 8, at, at, None, at, 1, None) == -1
    assert kernels.zk_swiglu(0, 1, -1, 8, at, at, None, at, 1, None) == -1


FORWARD, FC1, DSWIGLU = 0, 3, 4


def tiles_of_rows(kernels, product, tile, ends, rows, width):
    """Rows, columns and cluster of a tile, the starts, and expert, row, rows, column, beside of each tile, in order."""
    shape, ends = (ctypes.c_int32 * 3)(), torch.tensor(ends, dtype=torch.int32)
    kernels.tiling(product, tile, shape)
    groups, starts = len(ends), poison(len(ends) + 2, dtype=torch.int32)
    at_ends, at_starts = (ctypes.c_void_p(t.data_ptr()) for t in (ends, starts))
    kernels.count_units(product, tile, groups, ctypes.c_int64(rows), width, at_ends, at_starts)
    assert starts[-1] == 77
    tiles = torch.zeros(int(starts[groups]) * shape[2], 5, dtype=torch.int64)
    at_tiles = ctypes.c_void_p(tiles.data_ptr())
    kernels.tiles_at(product, tile, groups, ctypes.c_int64(rows), width, at_ends, at_starts, at_tiles)
    return tuple(shape), starts[:-1].tolist(), tiles.tolist()


COUNTS = {
    "one expert": [129],
    "around a tile": [63, 64, 65, 0, 127, 128, 129, 255, 256, 257, 1],
    "all empty": [0, 0, 0],
    "one takes all": [0] * 40 + [700] + [0] * 30,
    **{f"{e} experts": [(i * 37) % 90 for i in range(e)] for e in (31, 32, 33, 64, 65, 1024)},
}


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("product", [FORWARD, FC1])
@pytest.mark.parametrize("width", [8, 128, 200, 520])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_tiles_cover_each_element_of_its_expert_once(kernels, product, tile, width, counts):
    rows, ends = sum(counts) + 3, ends_of(counts).tolist()
    (down, across, cluster), starts, tiles = tiles_of_rows(kernels, product, tile, ends, rows, width)
    times = torch.zeros(rows, width, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for expert, row, left, column, _ in tiles:
        last = row + max(0, min(left, down))
        times[row:last, column : column + across] += 1
        assert (owner[row:last] == expert).all() and (column < width or left == 0)
    assert (times[: sum(counts)] == 1).all() and not times[sum(counts) :].any()
    # The blocks of a cluster share the weight's columns, or lie beside each other and share the rows.
    for first in range(0, len(tiles), cluster):
        (expert, row, left, column, beside), *other = tiles[first : first + cluster]
        assert left > 0 and bool(beside) == (cluster == 2 and other[0][1] == row)
        for theirs in other:
            assert theirs[0] == expert and (theirs[1] == row if beside else theirs[3] == column)
            assert theirs[3] == column + across if beside else theirs[1] == row + down
    # No block is idle but for one in a row of tiles whose number is odd.
    idle = sum(tile[2] <= 0 for tile in tiles)
    odd = -(-width // across) % 2 and sum(-(-count // down) % 2 for count in counts)
    assert idle == (odd if cluster == 2 else 0)
    assert starts[-1] * cluster == len(tiles)


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("ends", [[2, 900], [-3, 4], [300, 1, 300, 1, 300], [900, 900], [-1, -1]])
def test_ends_that_make_no_sense_give_tiles_within_the_rows(kernels, tile, ends):
    rows, width = 300, 136
    (down, *_), _, tiles = tiles_of_rows(kernels, FC1, tile, ends, rows, width)
    found = reference.spans(torch.tensor(ends), rows)
    for expert, row, left, *_ in tiles:
        begin, end = found[expert]
        assert row >= begin and (left <= 0 or (row + left == end and row + min(left, down) <= rows))


def test_a_product_of_rows_refuses_what_it_cannot_compute(kernels):
    memory = torch.zeros(4096)
    at = memory.data_ptr() + -memory.data_ptr() % 256

    def code(groups=2, rows=8, columns=16, depth=16, pre=at, out=at, x=at, maps=at, product=FC1):
        pointers = [ctypes.c_void_p(p) for p in (at, x, maps, pre, out)]
        return kernels.check_rows(product, 1, groups, ctypes.c_int64(rows), columns, depth, *pointers)

    assert code() == code(pre=None) == code(rows=0, x=None, out=None) == code(product=FORWARD, pre=None) == 0
    misaligned = [code(columns=12), code(depth=4), code(pre=at + 8), code(out=at + 8), code(x=at + 8)]
    assert misaligned + [code(maps=at + 32)] == [-3] * 6
    refused = [
        code(groups=0),
        code(groups=1025),
        code(rows=-1),
        code(x=None),
        code(out=None),
        code(maps=None),
    ]
    assert refused == [-1] * 6
    assert code(product=DSWIGLU) == 0 and code(product=DSWIGLU, pre=None) == -1
    assert code(rows=2**31 - 512, columns=2**24) == -1  # more units than an int counts
