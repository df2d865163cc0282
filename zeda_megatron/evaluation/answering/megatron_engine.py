"""A Megatron checkpoint, answered by the built-in engine in this process: any arm, pick rules and dials included."""

from __future__ import annotations

import torch

from ...config.generate import SamplingConfig
from ...distill.builtin_engine import BuiltinEngine
from ...errors import UserError
from ...models.config_values import text_settings
from ...models.load import load_model
from ...models.on_disk import ModelFacts, adapted_steps, read_facts
from ...moe import stats
from ...moe.router_dials import set_dials
from ...runtime import process_groups
from ..quality.measure import extra_costs
from ..quality.tune import apply_rule, turn_dial
from .engine import About, Answer, ChatPrompts, Origin, Request, fingerprint


class MegatronEngine:
    """Needs initialised process groups (one process).

    Args:
        options: `run.RunOptions`; `model` is a checkpoint folder of this project.
    """

    def __init__(self, options):
        self.group, self.parallel = options.concurrency, 1
        loaded = load_model(options.model)
        self.chunk, self.arch, self.tokenizer = loaded.chunk, loaded.arch, loaded.tokenizer
        if options.chat_variables:
            self.tokenizer.template_args = options.chat_variables
        self.prompts = ChatPrompts(self.tokenizer)
        set_dials(self.chunk, zero_mask=options.mask)
        rule = apply_rule(self.chunk, options, self.tokenizer)
        dial = turn_dial(self.chunk, options, self.tokenizer) if options.zero_dial else {}
        costs = (0.0, 0.0) if options.mask else extra_costs(self.chunk)
        settings = {"mask": options.mask, "rule": rule, **dial, "template_args": options.chat_variables}
        settings["device"] = process_groups.device().type
        facts = read_facts(options.model) or ModelFacts()
        dynamic = bool(facts.num_zero_experts) and not options.mask
        origin = Origin(dynamic, adapted_steps(options.model, "--model"))
        known = fingerprint(options.model), *costs, settings, origin, self.prompts.digest
        self.about = About(options.model, self.arch.hf, *known)
        self.skips = rule is not None or not options.mask

    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        prompts = [self.prompts.ids(r.messages) for r in requests]
        longest, context = max(map(len, prompts)), text_settings(self.arch.hf).get("max_position_embeddings")
        length = longest + sampling.max_new_tokens
        length = length if context is None else min(length, context)
        for request, prompt in zip(requests, prompts):
            if len(prompt) >= length:
                raise UserError(
                    f"{request.name}: its prompt has {len(prompt)} tokens, the model's context {context}"
                )
        stops, pad = self.tokenizer.eos_ids, self.tokenizer.pad_id
        engine = BuiltinEngine(self.chunk, stops, pad, length, self.tokenizer.vocab_size)
        made = engine.generate(prompts, sampling, [r.stream for r in requests])
        return [
            Answer(
                self.prompts.text(request.messages, one.response_ids),
                len(one.response_ids),
                len(prompt),
                one.finish_reason,
                self._share(prompt + one.response_ids[:-1]),
            )
            for request, prompt, one in zip(requests, prompts, made, strict=True)
        ]

    @torch.no_grad()
    def _share(self, tokens: list[int]) -> float:
        """Routing of the conversation once more, in one pass: it counts what rules and dials skip, too."""
        if not self.skips:
            return 0.0
        where = process_groups.device()
        ids, places = torch.tensor([tokens], device=where), torch.arange(len(tokens), device=where)[None]
        with stats.evaluating(self.chunk):
            self.chunk(ids, places, None, return_hidden=True)
            return stats.collect(self.chunk, self.chunk.config.num_layers, where).zero_share

    def slots(self) -> None:
        return None
