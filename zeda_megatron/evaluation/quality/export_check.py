"""Open an exported folder with transformers and compare it with the Megatron checkpoint it came from.

zeda evaluate export --megatron DIR --hf DIR --heldout FILE [--out check.json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config.arguments import parse, require
from ...config.generate import SamplingConfig
from ...config.run import Watched
from ...data.conversation import tokenize_rollout
from ...data.prompts import load_rollouts
from ...distill.builtin_engine import BuiltinEngine
from ...durable_file import write_result
from ...errors import UserError
from ...models.architecture import read_architecture
from ...models.hf_config import code_of, modeling_files
from ...models.load import load_model
from ...moe.stats import evaluating
from ...regular_file import read_regular
from ...runtime import process_groups
from ...runtime.terminal import ending, progress_bar, told
from .heldout import spread


@dataclass(frozen=True)
class CheckOptions(Watched):
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
    """Run the Python files of the folder even though they are not those of this project: only after reading them."""

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

    _refuse_foreign_code(Path(options.hf), options.trust_remote_code)
    ours = load_model(options.megatron)
    tokenizer = ours.tokenizer
    where = process_groups.device()
    # Our own files, or those that the user trusts.
    theirs = AutoModelForCausalLM.from_pretrained(options.hf, trust_remote_code=True, dtype=torch.float32)
    theirs = theirs.eval().to(where)
    rollouts = spread(list(load_rollouts(options.heldout)), options.prompts)
    prompts = [tokenizer.chat_ids(r.messages[:-1], add_generation_prompt=True) for r in rollouts]
    bar = progress_bar(2 * len(prompts), "answer", Path(options.hf).name, options.progress)
    length = max(map(len, prompts)) + options.max_new_tokens
    stops, pad = tokenizer.eos_ids, tokenizer.pad_id
    engine = BuiltinEngine(ours.chunk, stops, pad, length, on_answer=bar.update)
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
        with evaluating(ours.chunk):
            mine = ours.chunk(tokens, positions, None)[..., : ours.arch.vocab_size]
        others = theirs(tokens).logits
        largest = max(largest, (mine - others).abs().max().item())
        scale = max(scale, others.abs().max().item())
        compared += tokens.numel()
        bar.update()
    bar.close()
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


def _refuse_foreign_code(folder: Path, trusted: bool) -> None:
    """transformers imports whatever config.json names: without consent it may name our own modeling files alone."""
    arch = read_architecture(folder)
    ours = {file.name: file.read_bytes() for file in modeling_files(arch.name)}
    if trusted:
        return
    for file in sorted(folder.rglob("*.py")):
        if file.parent != folder or read_regular(file, 1_000_000) != ours.get(file.name):
            raise UserError(
                f"{file}: is not this project's; read it, then pass --trust-remote-code to run it"
            )
    named = arch.hf.get("auto_map") or {}
    if named not in ({}, code_of(arch.name)):
        raise UserError(
            f"{folder / 'config.json'}: auto_map {str(named)[:100]} names code that is not this project's; remove it, "
            "or pass --trust-remote-code to run it"
        )


def main(argv: list[str]) -> int:
    """Entry point: 0 if all answers are equal and all logits within the tolerance, 1 otherwise."""
    options = parse(argv, {"check": CheckOptions}, prog="zeda evaluate export")["check"]
    require(options, "megatron", "hf", "heldout")
    with process_groups.started():
        result = check(options)
    text = json.dumps(result, indent=2)
    if options.out:
        write_result("--out", options.out, text + "\n")
    print(text)
    good = result["equal_answers"] == result["prompts"] and result["equal_logits"]
    wrote = f"wrote {options.out}; " if options.out else ""
    if good:
        serve = f"vllm serve {options.hf}, or zeda evaluate run --model {options.hf}"
        told(ending(f"{wrote}{options.hf} answers as {options.megatron} does", serve))
    else:
        told(f"{wrote}{options.hf} does not answer as {options.megatron} does: export it again, and tell us")
    return 0 if good else 1
