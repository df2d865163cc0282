"""Experts that a step of decoding reads, and what it costs in quality, with a margin and without one.

python -m tools.measure.batch_decoding --teacher DIR --hf DIR --heldout heldout.jsonl

Held-out conversations are fed token by token, so many at a time; every step is compared with the teacher's distribution
for the same tokens. Skipping alone at several thresholds gives experts read against KL; a margin has to lie below that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality.heldout import load_held_out
from zeda_megatron.ops.vocab_kl import token_metrics
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.serving.load import load_model
from zeda_megatron.text_table import markdown_table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher", required=True, help="folder of the static model")
    parser.add_argument("--hf", required=True, help="folder of a model with paired zero experts")
    parser.add_argument("--heldout", required=True, help="held-out conversations, jsonl")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16], help="sequences at a time")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument(
        "--turns",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.75],
        help="added to the threshold without a margin",
    )
    parser.add_argument("--prompt", type=int, default=16, help="tokens that are read in one pass")
    parser.add_argument("--steps", type=int, default=24, help="tokens that are fed one by one")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


class Reads:
    """Counts, layer after layer and step after step, which experts have a row."""

    def __init__(self, model):
        self.model, self.on = model, False
        self.reset()
        for block in model.moe_blocks():
            block.experts.register_forward_pre_hook(self._count)

    def reset(self) -> None:
        self.model.reset_zero_share()
        self.experts = self.passes = 0

    def _count(self, _module, args) -> None:
        if self.on:
            self.experts += int(args[1].unique().numel())
            self.passes += 1


@torch.no_grad()
def decode(
    model, reads: Reads, ids_NS: torch.Tensor, batch: int, options, margin: float, more: float
) -> dict:
    """Feed [N, S] tokens, `batch` sequences at a time; log-probabilities [N, S - prompt, V] and what was read."""
    model.set_zero_dials(None)
    reads.reset()
    found = []
    for part in ids_NS.split(batch):
        model.set_zero_batch_margin(0.0)
        reads.on = False
        state = model(part[:, : options.prompt], use_cache=True)
        model.set_zero_batch_margin(margin)
        model.set_zero_dials([more] * len(part))
        reads.on = True
        steps = []
        for step in range(options.prompt, part.shape[1]):
            state = model(part[:, step : step + 1], past_key_values=state.past_key_values, use_cache=True)
            steps.append(F.log_softmax(state.logits[:, -1].float(), dim=-1))
        model.set_zero_dials(None)
        found.append(torch.stack(steps, dim=1))
    shares = model.zero_share()
    return {
        "log_p": torch.cat(found),
        "experts": reads.experts / max(reads.passes, 1),
        "share": sum(shares) / len(shares),
    }


def measure(teacher, model, ids_NS: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """One dict per batch and rule: experts read a layer and step, share of picks skipped, KL to the teacher."""
    with torch.no_grad():
        log_q = F.log_softmax(teacher(ids_NS).logits[:, options.prompt :].float(), dim=-1)
    labels = ids_NS[:, options.prompt :].flatten()
    rules = [("skipping alone", 0.0, more) for more in (0.0, *options.turns)]
    rules += [("margin", margin, 0.0) for margin in options.margins]
    reads, rows = Reads(model), []
    for batch in options.batches:
        for rule, margin, more in rules:
            made = decode(model, reads, ids_NS, batch, options, margin, more)
            kl = token_metrics(made["log_p"].flatten(0, 1), log_q.flatten(0, 1), labels)["kl"].double().mean()
            row = {"batch": batch, "rule": rule, "margin": margin, "turn": more, "kl": float(kl)}
            rows.append(row | {"experts": made["experts"], "share": made["share"]})
    return rows


def table(rows: list[dict]) -> list[str]:
    """Markdown lines: a rule per line, experts read and KL for every batch."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    rules = list(dict.fromkeys((row["rule"], row["margin"], row["turn"]) for row in rows))
    lines = []
    for rule, margin, more in rules:
        name = (
            f"margin {margin:g}"
            if rule == "margin"
            else f"threshold + {more:g}"
            if more
            else "skipping alone"
        )
        cells = []
        for batch in batches:
            (row,) = [
                r
                for r in rows
                if (r["batch"], r["rule"], r["margin"], r["turn"]) == (batch, rule, margin, more)
            ]
            cells.append(f"{row['experts']:.1f} / {row['kl']:.4f} / {row['share']:.0%}")
        lines.append([name, *cells])
    return markdown_table(["experts read / KL / skipped", *(f"batch {batch}" for batch in batches)], lines)


def main() -> int:
    """Command line of python -m tools.measure.batch_decoding."""
    options = parse()
    tokenizer, length = load_tokenizer(options.teacher), options.prompt + options.steps
    held_out = load_held_out(options.heldout, tokenizer, 1 << 20)
    rows = [sample.tokens[:length] for sample in held_out.samples if len(sample.tokens) >= length]
    if not rows:
        raise UserError(
            f"--heldout {options.heldout}: no conversation has {length} tokens (--prompt, --steps)"
        )
    ids_NS = torch.tensor(rows[: options.sequences])
    teacher, model = (
        load_model(folder, dtype=torch.float32).eval() for folder in (options.teacher, options.hf)
    )
    found = measure(teacher, model, ids_NS, options)
    if options.json:
        write_result("--json", options.json, json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    run_worker(main)
