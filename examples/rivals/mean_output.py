"""Zero experts that begin with the mean output of the real ones, in the manner of MoNE (arXiv 2507.00390), which puts
such a vector in the place of experts that it cuts.

python -m examples.rivals.mean_output --checkpoint DIR --calibration FILE --out DIR

The checkpoint has shared zero experts of the type `learned` (`--zero-experts-type` of the conversion), whose vectors
are zeros. In every layer all of them get the mean of what the experts gave to the tokens routed to them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from zeda_megatron.checkpoint.state import model_state, save_checkpoint
from zeda_megatron.config.arguments import Count, parse, require
from zeda_megatron.data.rows import load_rows
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.fit.paired_fit import watch_outputs
from zeda_megatron.models.hf_config import describe_checkpoint
from zeda_megatron.models.load import load_model
from zeda_megatron.models.on_disk import HF_CONFIG_NAME, beside, read_facts
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.runtime import process_groups
from zeda_megatron.runtime.whole_folder import new_folder
from zeda_megatron.runtime.worker import run_worker


@dataclass(frozen=True)
class MeanOptions:
    """What to begin with."""

    checkpoint: str | None = None
    """Megatron checkpoint with learned zero experts."""

    calibration: str | None = None
    """Rollout file whose conversations are routed (never the held-out one)."""

    rows: Count = 8
    """Packed rows of it."""

    seq_length: Count = 2048
    """Tokens of a row."""

    out: str | None = None
    """New checkpoint."""


@torch.no_grad()
def mean_outputs(model: torch.nn.Module, rows: list) -> dict[int, torch.Tensor]:
    """Layer number (from 1) -> mean over all picks of what the picked expert gave, without its weight: [H] float64. The
    zero experts are masked."""
    layers = {m.router.layer_number: m for m in model.modules() if isinstance(m, MoELayer)}
    sums = {number: torch.zeros(model.config.hidden_size, dtype=torch.float64) for number in layers}
    counts = dict.fromkeys(layers, 0)

    def sink(number: int):
        def add(x_RH, out_RH, expert_R, weight_R):
            sums[number] += out_RH.double().sum(0).cpu()
            counts[number] += len(out_RH)

        return add

    with zero_mask(model), watch_outputs(layers, {number: sink(number) for number in layers}):
        for row in rows:
            forward_model(model, row)
    return {number: sums[number] / max(counts[number], 1) for number in layers}


def begin(options: MeanOptions) -> None:
    """Read, compute, write. Raises `UserError` for missing flags, another kind of zero experts, or a folder in use."""
    require(options, "checkpoint", "calibration", "out")
    facts = read_facts(options.checkpoint)
    if facts is None or facts.zero_experts_type != "learned" or not facts.num_zero_experts:
        raise UserError(
            f"--checkpoint {options.checkpoint}: has no learned zero experts; convert with that type"
        )
    loaded = load_model(options.checkpoint)
    rows = load_rows(options.calibration, loaded.tokenizer, options.seq_length, options.rows)
    means = mean_outputs(loaded.chunk, rows)
    for module in loaded.chunk.modules():
        if isinstance(module, MoELayer):
            bias = module.router.zero_output.bias
            bias.data.copy_(means[module.router.layer_number].expand_as(bias))
    with new_folder(options.out, "--out") as staging:
        describe_checkpoint(staging, beside(options.checkpoint, HF_CONFIG_NAME), facts.whole())
        save_checkpoint(staging, 0, model_state([loaded.chunk]) | {"adapted_steps": facts.adapted_steps})


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv, {"mean_output": MeanOptions}, prog="mean_output")["mean_output"]
    with process_groups.started():
        begin(options)
    print(f"{Path(options.out)}: every zero expert begins with its layer's mean output")
    return 0


if __name__ == "__main__":
    run_worker(main)
