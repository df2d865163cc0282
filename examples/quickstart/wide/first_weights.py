"""First weights of a Qwen3-MoE teacher with few, wide experts: those of the quickstart's teacher, joined.

    python examples/quickstart/wide/first_weights.py --qwen examples/quickstart/teacher \
        --config examples/quickstart/wide/config.json --out DIR

Every wide expert holds the neurons of the same number of narrow ones, and as many fresh ones as it has room for, which
begin with no effect; its router row is the mean of theirs. Everything else carries over. Training has to mend the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM


@torch.no_grad()
def rewrite(narrow: Qwen3MoeForCausalLM, config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    torch.manual_seed(1234)
    wide = Qwen3MoeForCausalLM(config).float()
    theirs = {name: part for name, part in narrow.state_dict().items() if ".mlp." not in name}
    wide.load_state_dict(theirs, strict=False)
    for old, new in zip(narrow.model.layers, wide.model.layers, strict=True):
        join_experts(old.mlp, new.mlp)
    return wide


def join_experts(old, new) -> None:
    """Fill the wide experts of a layer, each from `joined` narrow ones that follow each other."""
    count, width = new.experts.down_proj.shape[0], new.experts.down_proj.shape[2]
    narrow = old.experts.down_proj.shape[2]
    joined = old.experts.down_proj.shape[0] // count
    # A narrow expert had the weight of one pick of many; now it shares one of fewer.
    scale = new.gate.top_k / old.gate.top_k
    new.gate.weight.copy_(old.gate.weight.unflatten(0, (count, joined)).mean(1))
    new.experts.down_proj.zero_()
    for expert in range(count):
        for place in range(joined):
            source, here = expert * joined + place, slice(place * narrow, (place + 1) * narrow)
            gate, up = old.experts.gate_up_proj[source].split(narrow)
            new.experts.gate_up_proj[expert, here] = gate
            new.experts.gate_up_proj[expert, width:][here] = up
            new.experts.down_proj[expert, :, here] = scale * old.experts.down_proj[source]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--qwen", type=Path, required=True, help="HF folder of the quickstart's teacher")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the wide teacher")
    parser.add_argument("--out", type=Path, required=True, help="HF folder to write")
    args = parser.parse_args()
    narrow = AutoModelForCausalLM.from_pretrained(args.qwen, dtype=torch.float32)
    wide = rewrite(narrow, Qwen3MoeConfig(**json.loads(args.config.read_text())))
    wide.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.qwen).save_pretrained(args.out)
    shutil.copy(args.config, args.out / "config.json")
    print(f"{args.out}: {sum(p.numel() for p in wide.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
