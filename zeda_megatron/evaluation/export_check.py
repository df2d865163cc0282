"""Open an exported folder with transformers and compare it with the Megatron checkpoint it came from.

python -m zeda_megatron.evaluation.export_check --megatron DIR --hf DIR --heldout FILE [--out check.json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..arguments import parse
from ..errors import UserError, run_main
from ..runtime import cpu, process_groups


@dataclass(frozen=True)
class CheckOptions:
    """What to compare."""

    megatron: str | None = None
    """Megatron checkpoint."""

    hf: str | None = None
    """Folder exported from it."""

    heldout: str | None = None
    """Held-out conversations (jsonl)."""

    prompts: int = 24
    """Prompts answered greedily by both."""

    max_new_tokens: int = 32
    """Longest answer."""

    tolerance: float = 1e-3
    """Largest difference of two logits, as a part of the largest logit, that counts as rounding."""

    trust_remote_code: bool = False
    """Open --hf with the modeling file in it, as other programs do: this runs that file. Off: with this package's."""

    out: str | None = None
    """JSON file for the result."""


@torch.no_grad()
def check(options: CheckOptions) -> dict:
    """Greedy answers of both, and the largest difference of their logits on the same conversations.

    Returns:
        `prompts`, `equal_answers`, `max_logit_difference` and `max_logit` (absolute values), `equal_logits` (the
        difference is within the tolerance), `zero_share_transformers`, `tokens_compared`.
    """
    from transformers import AutoModelForCausalLM

    from ..data.conversation import tokenize_rollout
    from ..data.prompts import load_rollouts
    from ..distill.builtin_engine import BuiltinEngine
    from ..distill.sampling import SamplingConfig
    from ..moe.switches import evaluating
    from ..serving.load import load_model as load_export
    from .models import load_model

    ours = load_model(options.megatron)
    tokenizer = ours.tokenizer
    where, kind = process_groups.device(), {"dtype": torch.float32}
    if options.trust_remote_code:
        theirs = AutoModelForCausalLM.from_pretrained(options.hf, trust_remote_code=True, **kind)
    else:
        theirs = load_export(options.hf, **kind)
    theirs = theirs.eval().to(where)
    rollouts = list(load_rollouts(options.heldout))
    rollouts = rollouts[:: max(1, len(rollouts) // options.prompts)][: options.prompts]
    prompts = [tokenizer.chat_ids(r.messages[:-1], add_generation_prompt=True) for r in rollouts]
    engine = BuiltinEngine(
        ours.chunk, tokenizer.eos_ids, tokenizer.pad_id, max(map(len, prompts)) + options.max_new_tokens
    )
    greedy = SamplingConfig(max_new_tokens=options.max_new_tokens, temperature=0.0)
    answers = [g.response_ids for g in engine.generate(prompts, greedy, [0] * len(prompts))]
    equal, largest, scale, compared = 0, 0.0, 0.0, 0
    for prompt, answer, rollout in zip(prompts, answers, rollouts):
        made = theirs.generate(
            torch.tensor([prompt], device=where),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=where),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(tokenizer.eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        equal += made[0, len(prompt) :].tolist() == answer
        tokens = torch.tensor([tokenize_rollout(rollout, tokenizer).tokens], device=where)
        positions = torch.arange(tokens.shape[1], device=where)[None]
        with evaluating(ours.chunk, return_hidden=False):
            mine = ours.chunk(tokens, positions, None)[..., : ours.arch.vocab_size]
        others = theirs(tokens).logits
        largest = max(largest, (mine - others).abs().max().item())
        scale = max(scale, others.abs().max().item())
        compared += tokens.numel()
    result = {
        "prompts": len(prompts),
        "equal_answers": equal,
        "max_logit_difference": largest,
        "max_logit": scale,
        "equal_logits": largest <= options.tolerance * scale,
        "tokens_compared": compared,
    }
    if hasattr(theirs, "zero_share"):
        shares = theirs.zero_share()
        result["zero_share_transformers"] = float(torch.as_tensor(shares, dtype=torch.float64).mean())
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 if all answers are equal and all logits within the tolerance, 1 otherwise."""
    options = parse(sys.argv[1:] if argv is None else argv, {"check": CheckOptions}, prog="export_check")[
        "check"
    ]
    for flag, value in (
        ("--megatron", options.megatron),
        ("--hf", options.hf),
        ("--heldout", options.heldout),
    ):
        if value is None:
            raise UserError(f"{flag} is missing")
    cpu.install()
    process_groups.initialize(process_groups.ParallelConfig())
    try:
        result = check(options)
    finally:
        process_groups.destroy()
    text = json.dumps(result, indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n")
    print(text)
    return 0 if result["equal_answers"] == result["prompts"] and result["equal_logits"] else 1


if __name__ == "__main__":
    run_main(main)
