"""How far a student is from its teacher on its own answers: what on-policy distillation makes small."""

from __future__ import annotations

import torch

from ...config.generate import SamplingConfig
from ...config.run import LossConfig
from ...data.packing import PackedDataset, TokenSample
from ...distill.builtin_engine import BuiltinEngine
from ...distill.passes import compare, means, total
from ...distill.teacher import Teacher
from ...moe.stats import evaluating

SLOTS = 128
"""Answers under way at a time."""


@torch.no_grad()
def own_answers(
    student, teacher: Teacher, prompts: list[list[int]], tokenizer, seq_length: int, max_new_tokens: int
) -> dict[str, float]:
    """Sample one answer per prompt at temperature 1 and score it with both models.

    Args:
        student: bare model chunk, its mask and pick rule set as the arm wants them.
        prompts: token ids.

    Returns:
        `reverse_kl`: KL(student || teacher), exact over the vocabulary that is sampled from, mean over the answers'
        tokens, nats; `tokens`; `response_length`: mean.
    """
    prompts = [prompt for prompt in prompts if len(prompt) < seq_length]
    vocab = min(tokenizer.vocab_size, student.head_weight().shape[0])
    engine = BuiltinEngine(student, tokenizer.eos_ids, tokenizer.pad_id, seq_length, vocab, SLOTS)
    made = engine.generate(prompts, SamplingConfig(max_new_tokens), list(range(len(prompts))))
    samples = [
        TokenSample(prompt + one.response_ids, [False] * len(prompt) + [True] * len(one.response_ids))
        for prompt, one in zip(prompts, made, strict=True)
    ]
    data = PackedDataset(samples, seq_length, tokenizer.pad_id, seed=0)
    rows = [data[row] for row in range(data.rows_in_epoch(0))]
    with evaluating(student):
        compared = compare([student], teacher, rows, seq_length, LossConfig("reverse_kl"), vocab)
    found = means(total([row.sums for row in compared]))
    return {
        "reverse_kl": found["loss"],
        "tokens": found["tokens"],
        "response_length": found["tokens"] / len(made),
    }
