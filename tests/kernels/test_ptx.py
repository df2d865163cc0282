"""The interpreter of PTX itself: instructions against numpy, and that it stops at what a GPU would not forgive."""

import ctypes

import numpy as np
import pytest
from ptx import parse
from ptx.grid import Deadlock, Grid, Launch
from ptx.machine import compile_one
from ptx.memory import GlobalMemory, MemoryFault
from ptx.tensor_map import FIELDS, MAGIC
from ptx.warp import Program

HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 pool[];
.entry kernel(.param .u64 first, .param .u64 second, .param .align 64 .b8 map[128]) {
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %d<20>;
ld.param.u64 %d1, [first]; ld.param.u64 %d2, [second];
mov.u32 %r1, %tid.x; mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d1, %d3; add.s64 %d5, %d2, %d3;
"""


def run(body, first, second, tensor=None, threads=32, blocks=1, cluster=1, shared=0, seed=0):
    """Run a kernel over two arrays; thread i finds element i of each at %d4 and %d5."""
    kernel = parse.read(HEAD + body + "\nret;\n}")["kernel"]
    memory = GlobalMemory()
    memory.allow(first.ctypes.data, first.nbytes, "first", writable=False)
    memory.allow(second.ctypes.data, second.nbytes, "second")
    if tensor is None:
        tensor = np.zeros(128, np.uint8)
    pointers = [ctypes.c_uint64(first.ctypes.data), ctypes.c_uint64(second.ctypes.data)]
    arguments = [ctypes.addressof(pointer) for pointer in pointers] + [tensor.ctypes.data]
    launch = Launch((blocks, 1, 1), (threads, 1, 1), (cluster, 1, 1), shared)
    with np.errstate(all="ignore"):
        Grid(Program(kernel, compile_one), launch, arguments, memory, seed).run()
    return second


def ints(count=32, seed=0):
    return np.random.default_rng(seed).integers(-(2**31), 2**31, count).astype(np.int32)


def floats(count=32, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r3, %r2, 7;", lambda x: x + np.int32(7)),
        ("mul.lo.s32 %r3, %r2, -3;", lambda x: x * np.int32(-3)),
        ("div.s32 %r3, %r2, 7;", lambda x: np.trunc(x / 7).astype(np.int32)),
        ("rem.s32 %r3, %r2, 7;", np.vectorize(lambda v: int(np.fmod(v, 7)))),
        ("shr.s32 %r3, %r2, 40;", lambda x: x >> 31),
        ("shl.b32 %r3, %r2, 5;", lambda x: x << 5),
        ("shr.u32 %r3, %r2, 3;", lambda x: x.view(np.uint32) >> 3),
        ("popc.b32 %r3, %r2;", np.vectorize(lambda v: (int(v) & 0xFFFFFFFF).bit_count())),
        ("brev.b32 %r3, %r2; brev.b32 %r3, %r3;", lambda x: x),
        ("bfind.shiftamt.u32 %r3, %r2;", np.vectorize(lambda v: 32 - (int(v) & 0xFFFFFFFF).bit_length())),
        ("bfi.b32 %r3, %r2, -1, 4, 8;", lambda x: ~np.int32(0xFF0) | (x << 4 & 0xFF0)),
        (
            "mul.wide.s32 %d6, %r2, %r2; shr.u64 %d6, %d6, 32; cvt.u32.u64 %r3, %d6;",
            lambda x: x.astype(np.int64) ** 2 >> 32,
        ),
        ("cvt.s64.s32 %d6, %r2; mul.hi.u64 %d6, %d6, %d6; cvt.u32.u64 %r3, %d6;", None),
        (
            "mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};",
            lambda x: x.view(np.uint32) << 16 | x.view(np.uint32) >> 16,
        ),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;", lambda x: np.where(x < 0, 1, 2)),
        ("and.b32 %r3, %r2, 31; shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;", lambda x: x[np.arange(32) ^ 5]),
        ("shfl.sync.up.b32 %r3|%p1, %r2, 3, 0, -1;", lambda x: np.concatenate([x[:3], x[:-3]])),
        (
            "setp.gt.s32 %p1, %r2, 0; vote.sync.ballot.b32 %r3, %p1, -1;",
            lambda x: np.full(32, sum(1 << i for i in range(32) if x[i] > 0)).astype(np.uint32),
        ),
    ],
)
def test_integers(code, expected):
    x = ints()
    out = run(f"ld.global.u32 %r2, [%d4]; {code} st.global.u32 [%d5], %r3;", x, np.zeros(32, np.uint32))
    if expected is None:
        wide = [int(v) % 2**64 for v in x]
        right = np.array([(v * v >> 64) % 2**32 for v in wide], np.uint32)
    else:
        right = np.asarray(expected(x)).astype(np.int64).astype(np.uint32)
    assert np.array_equal(out, right)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fma.rn.f32 %f3, %f2, %f2, 0f3F800000;", lambda x: x * x + 1),
        ("neg.f32 %f3, %f2; ex2.approx.ftz.f32 %f3, %f3; rcp.rn.f32 %f3, %f3;", lambda x: 2**x),
        ("cvt.sat.f32.f32 %f3, %f2;", lambda x: np.clip(x, 0, 1)),
        ("cvt.rn.bf16x2.f32 %r3, %f2, %f2; and.b32 %r3, %r3, -65536; mov.b32 %f3, %r3;", None),
    ],
)
def test_floats(code, expected):
    x = floats()
    out = run(f"ld.global.f32 %f2, [%d4]; {code} st.global.f32 [%d5], %f3;", x, np.zeros(32, np.float32))
    if expected is None:  # to bfloat16 and back, as torch rounds
        torch = pytest.importorskip("torch")
        assert np.array_equal(out, torch.from_numpy(x).bfloat16().float().numpy())
    else:
        np.testing.assert_allclose(out, expected(x), rtol=1e-6)


def test_rounding_down_is_not_rounding_to_nearest():
    x = floats()
    out = run(
        "ld.global.f32 %f2, [%d4]; fma.rm.f32 %f3, %f2, 0f3DCCCCCD, 0f4B400001; st.global.f32 [%d5], %f3;",
        x,
        np.zeros(32, np.float32),
    )
    exact = x.astype(np.float64) * np.float64(np.float32(0.1)) + 12582913.0
    assert np.array_equal(out, np.floor(exact).astype(np.float32))


def test_lanes_that_part_meet_again():
    body = """
    mov.u32 %r3, 0;
    $loop: setp.ge.u32 %p1, %r3, %r1; @%p1 bra $out; add.s32 %r3, %r3, 1; bra $loop;
    $out: bar.warp.sync -1; shfl.sync.idx.b32 %r4, %r3, 31, 31, -1;
    { .reg .b32 %r3; mov.u32 %r3, 5; LAB: add.s32 %r4, %r4, %r3; }
    st.global.u32 [%d5], %r4;
    """
    assert (run(body, ints(), np.zeros(32, np.uint32)) == 31 + 5).all()


@pytest.mark.parametrize("seed", range(5))
def test_warps_meet_at_a_barrier_and_blocks_have_their_own_memory(seed):
    body = """
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, pool; shl.b32 %r4, %r1, 2; add.s32 %r5, %r3, %r4;
    add.s32 %r6, %r1, %r2; st.shared.u32 [%r5], %r6; bar.sync 0;
    xor.b32 %r7, %r4, 252; add.s32 %r7, %r3, %r7; ld.shared.u32 %r8, [%r7];
    mad.lo.s32 %r9, %r2, 64, %r1; mul.wide.u32 %d3, %r9, 4; add.s64 %d5, %d2, %d3; st.global.u32 [%d5], %r8;
    """
    out = run(body, ints(), np.zeros(128, np.uint32), threads=64, blocks=2, shared=256, seed=seed)
    assert np.array_equal(out, np.concatenate([np.arange(64)[::-1], np.arange(64)[::-1] + 1]))


def tensor_map(array, box, swizzle=0):
    made = np.zeros(1, FIELDS)
    made["magic"], made["rank"], made["element"], made["swizzle"] = MAGIC, 2, array.itemsize, swizzle
    made["address"] = array.ctypes.data
    made["dims"][0][:2], made["box"][0][:2], made["strides"][0][0] = (
        array.shape[::-1],
        box[::-1],
        array.strides[0],
    )
    return made.view(np.uint8)


COPY = """
mov.u32 %r2, pool; add.s32 %r3, %r2, 4096; mov.u64 %d6, map; setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%d6, {8, -2}], [%r3];
"""
WAIT = "$wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra $wait;"
TAKE = "shl.b32 %r4, %r1, 2; add.s32 %r4, %r2, %r4; ld.shared.u32 %r5, [%r4+512]; st.global.u32 [%d5], %r5;"


def test_a_box_arrives_with_zeros_outside_the_tensor():
    array = np.arange(40 * 16, dtype=np.uint32).reshape(40, 16)
    out = run(COPY + WAIT + TAKE, array, np.zeros(32, np.uint32), tensor_map(array, (32, 8)), shared=4104)
    expected = np.zeros((32, 8), np.uint32)
    expected[2:] = array[:30, 8:]
    assert np.array_equal(out, expected[16:20].reshape(-1))


def test_swizzled_boxes_lie_as_matrix_descriptors_read_them():
    """A copy with the 128-byte swizzle, then a product over it: both modes of the same bits."""
    rng = np.random.default_rng(0)
    for flip, shape in ((0, (64, 64)), (1, (64, 64))):
        array = rng.integers(-3, 4, shape).astype(np.float32)
        half = (array.view(np.uint32) >> 16).astype(np.uint16)
        slots = ", ".join(f"%f{i}" for i in range(4))
        stride, leading = (1024 >> 4) << 32, 0
        body = f"""
        mov.u32 %r2, pool; add.s32 %r3, %r2, 8192; mov.u64 %d6, map; setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r3], 1; bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 8192;
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%d6, {{0, 0}}], [%r3];
        {WAIT}
        cvt.u64.u32 %d7, %r2; shr.u64 %d7, %d7, 4; or.b64 %d7, %d7, {stride | leading | 1 << 62};
        setp.ne.b32 %p3, 0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{slots}}}, %d7, %d7, %p3, 1, 1, {flip}, {flip};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %d8, %r1, 16; add.s64 %d8, %d2, %d8; st.global.v4.f32 [%d8], {{{slots}}};
        """
        out = run(
            body, half, np.zeros(512, np.float32), tensor_map(half, (64, 64), 3), threads=128, shared=8200
        )
        rows = array[:, :16] if flip == 0 else array[:16].T
        product = rows @ rows[:8].T
        thread = np.arange(128)
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for i in range(4):
            assert np.array_equal(out.reshape(128, 4)[:, i], product[row + 8 * (i // 2), column + i % 2])


def test_reading_a_box_before_it_is_waited_for_finds_poison():
    array = np.arange(40 * 16, dtype=np.uint32).reshape(40, 16)
    seen = [
        run(
            COPY + TAKE + WAIT,
            array,
            np.zeros(32, np.uint32),
            tensor_map(array, (32, 8)),
            shared=4104,
            seed=s,
        )
        for s in range(8)
    ]
    assert any((out == 0xFFFFFFFF).any() for out in seen)


def test_an_access_past_an_array_names_it():
    with pytest.raises(MemoryFault, match=r"write to 4 bytes at second \+ 124"):
        run("st.global.u32 [%d5+124], %r1;", ints(), np.zeros(32, np.uint32)[:31])
    with pytest.raises(MemoryFault, match="first, which is read-only"):
        run("st.global.u32 [%d4], %r1;", ints(), np.zeros(32, np.uint32))
    with pytest.raises(MemoryFault, match="shared address"):
        run("mov.u32 %r2, pool; st.shared.u32 [%r2+256], %r1;", ints(), np.zeros(32, np.uint32), shared=256)


def test_a_wait_for_what_never_comes_is_a_deadlock():
    array = np.zeros((40, 16), np.uint32)
    short = COPY.replace("1024;", "1028;")
    with pytest.raises(Deadlock, match=r"mbarrier\.try_wait"):
        run(short + WAIT, array, np.zeros(32, np.uint32), tensor_map(array, (32, 8)), shared=4104)


def test_shared_memory_that_no_fence_has_shown_cannot_be_copied_out():
    out = np.zeros((4, 32), np.uint32)
    body = """
    mov.u32 %r2, pool; shl.b32 %r4, %r1, 2; add.s32 %r4, %r2, %r4; st.shared.u32 [%r4], %r1; {fence}
    bar.sync 0; mov.u64 %d6, map; setp.eq.u32 %p1, %r1, 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d6, {{0, 1}}], [%r2];
    @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;
    """
    options = {"tensor": tensor_map(out, (1, 32)), "shared": 1024}
    run(body.format(fence="fence.proxy.async.shared::cta;"), ints(), out, **options)
    assert np.array_equal(out[1], np.arange(32)) and not out[[0, 2, 3]].any()
    with pytest.raises(MemoryFault, match=r"no fence\.proxy\.async"):
        run(body.format(fence=""), ints(), out, **options)


def test_an_unknown_instruction_stops_when_it_is_reached():
    skipped = "setp.ne.u32 %p1, %r1, %r1; @%p1 dp4a.u32.u32 %r2, %r1, %r1, %r1;"
    run(skipped, ints(), np.zeros(32, np.uint32))
    with pytest.raises(NotImplementedError, match="dp4a"):
        run("dp4a.u32.u32 %r2, %r1, %r1, %r1;", ints(), np.zeros(32, np.uint32))
