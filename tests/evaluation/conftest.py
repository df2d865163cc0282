"""What several tests of the evaluation start from."""

import pytest
import tiny
import tiny_world


@pytest.fixture(scope="module")
def paired_export(world, one_process, tmp_path_factory):
    """(checkpoint of paired zero experts with drawn heads, folder exported from it)."""
    from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
    from zeda_megatron.moe.paired import paired_modules
    from zeda_megatron.moe.router_dials import set_thresholds

    folder = tmp_path_factory.mktemp("paired")
    run = tiny_world.start(
        world, save=folder, pretrained_checkpoint=world.static, zero_expert_routing="paired"
    )
    for i, head in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(head, seed=i, std=0.1)
    set_thresholds(run.student.chunks, [-2.0])
    run.save()
    megatron_to_hf(folder, world.hf, folder / "out")
    return folder, folder / "out"
