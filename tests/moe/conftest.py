"""All tests of this room run Megatron modules in one process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _megatron(one_process):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # The pipeline schedule sets this global of Megatron's; other tests may have run one.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
