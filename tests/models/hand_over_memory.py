"""Peak memory of a hand-over of weights at Qwen3-30B-A3B's geometry, one layer, bf16: a line of JSON from each rank.

PYTHONPATH=. python -m torch.distributed.run --standalone --nproc-per-node 2 tests/models/hand_over_memory.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch

from tools.measure.loss_memory import resident
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.models.live_weights import LiveWeights, write_weights
from zeda_megatron.runtime.agreement import rank, world_size
from zeda_megatron.runtime.process_groups import started


def main(folder: Path) -> None:
    parallel = ParallelConfig(expert_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    hf = json.loads((Path(__file__).parents[2] / "examples/qwen3_30b_a3b/config.json").read_text())
    with started(parallel):
        arch = read_architecture(hf | {"num_hidden_layers": 1})
        config = transformer_config(arch, parallel, torch.bfloat16)
        chunk = build_gpt_model(arch, config, ZeroExpertConfig(64)).to(torch.bfloat16)
        weights = LiveWeights([chunk], arch)

        def engine():
            for _, tensor in weights.tensors():
                tensor.max()  # touched, and not kept: the engine's copy is its own

        def server():
            write_weights(weights.tensors(), folder if rank() == 0 else None)

        found = {"rank": rank(), "ranks": world_size()}
        for name, hand_over in (("engine", engine), ("server", server)):
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            hand_over()
            found[name] = resident("VmHWM") - before
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
