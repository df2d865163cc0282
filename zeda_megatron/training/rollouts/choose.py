"""From options to what samples answers."""

from __future__ import annotations

import torch

from ...config.generate import GenerateOptions
from ...config.zero_experts import ZeroExpertConfig
from ...data.tokenizers import ChatTokenizer
from ...distill.builtin_engine import BuiltinEngine
from ...distill.rollout import RolloutEngine
from ...models.architecture import Architecture
from .vllm_engine import VLLMEngine


def rollout_engine(
    options: GenerateOptions,
    chunks: list[torch.nn.Module],
    arch: Architecture,
    zero: ZeroExpertConfig,
    tokenizer: ChatTokenizer,
    max_length: int,
    static: bool = False,
) -> RolloutEngine:
    """The engine that --rollout-engine names. `static`: the zero experts are masked, the weights do not change."""
    vocab, slots = min(tokenizer.vocab_size, arch.vocab_size), options.generate_batch_size
    if options.rollout_engine == "vllm":
        return VLLMEngine(chunks[0], arch, zero, tokenizer.eos_ids, max_length, vocab, slots, static)
    return BuiltinEngine(chunks, tokenizer.eos_ids, tokenizer.pad_id, max_length, vocab, slots)
