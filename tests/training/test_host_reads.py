"""A training step's waits for the device do not grow with the model's layers."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import tiny_world
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zeda_megatron

pytestmark = pytest.mark.usefixtures("one_process")
PACKAGE = str(Path(zeda_megatron.__file__).parent)
PRODUCT = ("moe/dispatch.py", "moe/experts.py", "ops/grouped_mlp.py")
"""Row counts decide how large the experts' buffers are: Megatron's dispatchers need them on the host, too."""


WAITS = {
    getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "masked_select")
}
WAITS |= {torch.ops.aten.bincount.default, torch.ops.aten._unique2.default}
"""Operators whose result, or its size, the host needs: on a GPU it waits for them."""


def waits(func, args) -> bool:
    chosen = args[1] if func is torch.ops.aten.index.Tensor else ()
    return func in WAITS or any(index is not None and index.dtype == torch.bool for index in chosen)


class HostReads(TorchDispatchMode):
    """Counts where this package's own code waits, by file and function; Megatron's optimizer, permutation and rotary
    embedding wait on their own. On the CPU every number is counted that is read as `item`, `float` or `bool`.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            stack = traceback.extract_stack()
            reader = next(
                frame
                for frame in reversed(stack)
                if "/torch/" not in frame.filename and frame.filename != __file__
            )
            place = reader.filename.removeprefix(PACKAGE + "/")
            if reader.filename.startswith(PACKAGE) and place not in PRODUCT:
                self.counts[place, reader.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["shared", "paired"])
def worlds(request, tmp_path_factory):
    """Models of 2 and of 6 layers, and the flags that train them."""
    made = [
        tiny_world.make_world(tmp_path_factory.mktemp(f"deep{layers}"), num_hidden_layers=layers)
        for layers in (2, 6)
    ]
    if request.param == "shared":
        return [(world, {"target_zero_share": 0.5}) for world in made]
    paired = {"zero_expert_routing": "paired", "target_zero_share": 0.4, "paired_head_lr": 1e-3}
    paired["moe_router_load_balancing_type"] = "none"
    return [
        (world, paired | {"pretrained_checkpoint": world.static, "teacher_load": world.static})
        for world in made
    ]


def test_host_reads_of_a_step_do_not_grow_with_layers(worlds):
    counted = []
    for world, flags in worlds:
        run = tiny_world.start(world, train_iters=2, **flags)
        step, reads = run._one_step, HostReads()

        def watched(log, run=run, step=step, reads=reads):
            with reads if run.iteration == 1 else torch.enable_grad():
                step(log)

        run._one_step = watched
        run.run()
        counted.append(reads.counts)
    assert counted[0] == counted[1] and counted[0].total() > 0
