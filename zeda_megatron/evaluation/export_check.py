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

    out: str | None = None
    """JSON file for the result."""


@torch.no_grad()
def check(options: CheckOptions) -> dict:
    """Greedy answers of both, and the largest difference of their logits on the same conversations.

    Returns:
        `prompts`, `equal_answers`, `max_logit_difference`, `zero_share_transformers`, `tokens_compared`.
    """
    from transformers import AutoModelForCausalLM

    from ..data.conversation import tokenize_rollout
    from ..data.prompts import load_rollouts
    from ..distill.builtin_engine import BuiltinEngine
    from ..distill.sampling import SamplingConfig
    from .models import load_model

    ours = load_model(options.megatron)
    tokenizer = ours.tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(
        options.hf, trust_remote_code=True, dtype=torch.float32
    ).eval()
    rollouts = list(load_rollouts(options.heldout))
    rollouts = rollouts[:: max(1, len(rollouts) // options.prompts)][: options.prompts]
    prompts = [tokenizer.chat_ids(r.messages[:-1], add_generation_prompt=True) for r in rollouts]
    engine = BuiltinEngine(
        ours.chunk, tokenizer.eos_ids, tokenizer.pad_id, max(map(len, prompts)) + options.max_new_tokens
    )
    greedy = SamplingConfig(max_new_tokens=options.max_new_tokens, temperature=0.0)
    mine = [g.response_ids for g in engine.generate(prompts, greedy, [0] * len(prompts))]
    equal, largest, compared = 0, 0.0, 0
    for prompt, answer, rollout in zip(prompts, mine, rollouts):
        made = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(tokenizer.eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        equal += made[0, len(prompt) :].tolist() == answer
        tokens = torch.tensor([tokenize_rollout(rollout, tokenizer).tokens])
        positions = torch.arange(tokens.shape[1])[None]
        ours.chunk.return_hidden = False
        difference = ours.chunk(tokens, positions, None)[..., : ours.arch.vocab_size] - theirs(tokens).logits
        largest = max(largest, difference.abs().max().item())
        compared += tokens.numel()
    result = {
        "prompts": len(prompts),
        "equal_answers": equal,
        "max_logit_difference": largest,
        "tokens_compared": compared,
    }
    if hasattr(theirs, "zero_share"):
        shares = theirs.zero_share()
        result["zero_share_transformers"] = float(torch.as_tensor(shares, dtype=torch.float64).mean())
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 if all answers are equal, 1 otherwise."""
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
    return 0 if result["equal_answers"] == result["prompts"] else 1


if __name__ == "__main__":
    run_main(main)
