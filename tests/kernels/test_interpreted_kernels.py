"""The compiled kernels, interpreted: orders of execution, the Ampere kernels, what accesses cost; and that a kernel
with a fault in it does not pass. The numbers themselves are checked by tests/gpu, which runs interpreted too.
"""

from dataclasses import replace

import pytest
import torch
from groups import exact, fc1_inputs, mlp_inputs, near
from ptx.grid import Deadlock
from ptx.machine import Machine
from ptx.memory import MemoryFault
from ptx.operators import interpreted
from ptx.traffic import Traffic

import zeda_kernels.expert_ops  # noqa: F401  (registers torch.ops.zeda)
from zeda_kernels import cuda_kernels, reference

pytestmark = pytest.mark.slow
ops = torch.ops.zeda
COUNTS = [70, 0, 3, 130, 257, 0]


def machine_of(interpreted_library, seed=0):
    """The library, and a machine with kernels of its own, so that a test may spoil them."""
    made, kernels = interpreted_library
    own = {name: replace(kernel, instructions=list(kernel.instructions)) for name, kernel in kernels.items()}
    return made, Machine(made.functions, own, seed)


@pytest.mark.parametrize("tile", [0, 1])
def test_no_order_of_warps_copies_and_products_changes_a_bit(interpreted_library, tile, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    x, fc1, probs, ends = fc1_inputs(COUNTS, 136, 264, extra_rows=5)
    found = []
    for seed in range(0, 500, 100):
        monkeypatch.setenv("ZEDA_KERNEL_LEAD", str(seed // 100 % 4))
        made, machine = machine_of(interpreted_library, seed)
        with interpreted(made, machine):
            pre, act = ops.moe_fc1(x, fc1, probs, ends)
            main = [torch.full((272, 264), float("nan")) for _ in COUNTS]
            ops.grouped_wgrad_(main, pre, x, ends, False)
            found.append([pre, act, ops.grouped_mm(x, fc1, ends), ops.grouped_dgrad(pre, fc1, ends), *main])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0]))
    near(found[0][0], reference.grouped_mm(exact(x), exact(fc1), ends), 1e-2)
    assert torch.equal(found[0][0], found[0][2])  # the fused product is the product


def test_the_ampere_kernels(interpreted_library):
    made, machine = machine_of(interpreted_library)
    inputs = mlp_inputs(COUNTS, 136, 72, extra_rows=5, dtype=torch.bfloat16)
    x, probs, ends, fc1, fc2 = inputs
    wide = exact(inputs)
    with interpreted(made, machine, arch=80):
        out, pre = ops.expert_mlp(*inputs)
        found = ops.expert_mlp_backward(out, x, pre, probs, ends, fc1, fc2)
    assert not any("sm90" in name or "Sm90" in name for name in machine.launches)
    wide_out, wide_pre = ops.expert_mlp(*wide)
    near(out, wide_out, 1e-2)
    expected = ops.expert_mlp_backward(out.double(), wide[0], wide_pre, *wide[1:])
    for mine, right in zip(found, expected):
        near(mine, right, 2e-2)


TOUCHES = ("ld.global", "st.global", "cp.async.bulk", "fence.proxy.tensormap")


def test_no_product_of_rows_touches_memory_before_the_kernel_before_it_has_ended(interpreted_library):
    """They are launched while that one may still run: every thread waits first, on every path."""
    kernels = [kernel for name, kernel in interpreted_library[1].items() if "sm904rows" in name]
    assert len(kernels) == 8
    for kernel in kernels:
        opcodes = [inst.opcode for inst in kernel.instructions]
        wait = opcodes.index("griddepcontrol.wait")
        assert kernel.instructions[wait].guard is None
        assert not any(opcode.startswith((*TOUCHES, "ret", "exit")) for opcode in opcodes[:wait])
        jumps = [inst for inst in kernel.instructions[:wait] if inst.opcode.startswith("bra")]
        assert all(kernel.labels[label] <= wait for inst in jumps for label in inst.operands)
        assert any(opcode.startswith(TOUCHES) for opcode in opcodes[wait:])


ORDERS = {
    "the first block starves": lambda warp: warp.block.rank == 0,
    "the second block starves": lambda warp: warp.block.rank == 1,
    "the first warpgroup starves": lambda warp: warp.index < 4,
    "the second warpgroup starves": lambda warp: 4 <= warp.index < 8,
    "those that load starve": lambda warp: warp.index >= 8,
}
"""Who runs only when nobody else can."""


def unsound(made, machine) -> bool:
    """Whether a product of rows fails, or comes out wrong."""
    x, fc1, probs, ends = fc1_inputs(COUNTS, 136, 264, extra_rows=5)
    with interpreted(made, machine):
        try:
            pre, _ = ops.moe_fc1(x, fc1, probs, ends)
        except (MemoryFault, Deadlock):
            return True
    expected = reference.grouped_mm(exact(x), exact(fc1), ends)
    return not pre.isfinite().all() or bool((pre.double() - expected).norm() > 0.1 * expected.norm())


@pytest.mark.parametrize("lead", [0, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_the_large_tile_is_sound_whoever_starves(interpreted_library, order, lead, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: 1)
    monkeypatch.setenv("ZEDA_KERNEL_LEAD", str(lead))
    made, machine = machine_of(interpreted_library)
    machine.starves = ORDERS[order]
    assert not unsound(made, machine)


def test_a_cluster_that_does_not_wait_for_its_other_block_is_found_out_by_who_starves(
    interpreted_library, monkeypatch
):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: 1)
    found = []
    for order in ("the first block starves", "the second block starves"):
        made, machine = machine_of(interpreted_library)
        machine.starves = ORDERS[order]
        put_in(machine, "barrier.cluster", NO)
        found.append(unsound(made, machine))
    assert any(found)


@pytest.mark.parametrize("tile", [0, 1])
def test_epilogues_have_no_bank_conflicts_and_store_whole_sectors(interpreted_library, tile, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    made, machine = machine_of(interpreted_library)
    traffic = Traffic()
    x, fc1, probs, ends = fc1_inputs(COUNTS, 128, 264, extra_rows=0)
    with interpreted(made, machine):
        ops.moe_fc1(x, fc1, probs, ends)  # compiled
        ops.grouped_mm(x, fc1, ends)
        machine.observe = traffic.see
        ops.moe_fc1(x, fc1, probs, ends)
        ops.grouped_mm(x, fc1, ends)
    assert traffic.turns == traffic.least and any(op.startswith("stmatrix") for op in traffic.turns)
    stores = [op for op in traffic.sectors if op.startswith("st.global.v4")]
    assert stores and sum(traffic.bytes[op] for op in stores) == len(x) * 5 * 128 * 2
    assert all(32 * traffic.sectors[op] == traffic.bytes[op] for op in stores)


NO = "griddepcontrol.wait"
FAULTS = {
    "no wait for the copies": ("mbarrier.try_wait", "setp.eq.u32"),
    "no wait for the product": ("wgmma.wait_group", NO),
    "no fence before tensor maps": ("fence.proxy.tensormap::generic.acquire", NO),
    "stages never given back": ("mbarrier.arrive.shared::cluster", NO),
    "copies never announced": ("mbarrier.arrive.expect_tx", NO),
}


def test_the_second_half_of_a_large_tile_waits_for_the_first(interpreted_library, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: 1)
    made, machine = machine_of(interpreted_library)
    put_in(machine, "bar.arrive", NO)
    assert unsound(made, machine)  # it waits for ever


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tile", [0, 1])
def test_a_kernel_with_a_fault_is_found_out(interpreted_library, fault, tile, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tile_for", lambda rows, groups: tile)
    made, machine = machine_of(interpreted_library)
    put_in(machine, *FAULTS[fault])
    assert unsound(made, machine)


def put_in(machine, begins: str, fault: str) -> None:
    """Put `fault` in the place of the instructions of products of rows that begin so."""
    changed = 0
    for kernel in machine.kernels.values():
        for i, inst in enumerate(kernel.instructions):
            if "sm904rows" in kernel.name and inst.opcode.startswith(begins):
                kernel.instructions[i], changed = _faulty(inst, fault), changed + 1
    assert changed


def _faulty(inst, opcode):
    if opcode == NO:
        return replace(inst, opcode=NO, operands=())
    out, _, parity, *_ = inst.operands
    return replace(inst, opcode=opcode, operands=(out, parity, parity))  # waited for: always


def test_products_that_are_stored_without_a_fence_are_found_out(interpreted_library):
    made, machine = machine_of(interpreted_library)
    for kernel in machine.kernels.values():
        for i, inst in enumerate(kernel.instructions):
            if inst.opcode.startswith("fence.proxy.async"):
                kernel.instructions[i] = replace(inst, opcode=NO, operands=())
    x, _, _, ends = fc1_inputs(COUNTS, 136, 264, extra_rows=5)
    dy = torch.randn(len(x), 272).bfloat16()
    with interpreted(made, machine), pytest.raises(MemoryFault, match=r"no fence\.proxy\.async"):
        ops.grouped_wgrad_([torch.zeros(272, 264) for _ in COUNTS], dy, x, ends, False)
