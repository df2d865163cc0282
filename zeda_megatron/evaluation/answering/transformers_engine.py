"""A model folder opened with transformers: ours with zero experts, the authors', or a static one.

Prompts of unequal length are one batch, padded on the left; the zero share is counted by row.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ...config.generate import SamplingConfig
from ...data.tokenizers import load_tokenizer
from ...distill.answers import Sampler
from ...errors import UserError
from ...models.hf_config import zero_experts_of
from ...planning.flops import Geometry
from ...strict_json import read_json
from .engine import About, Answer, ChatPrompts, Origin, Request, fingerprint

_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest row of the batch."""


class TransformersEngine:
    """Answers in batches with `generate`; every answer has its own random stream.

    Args:
        folder: Hugging Face folder.
        batch: answers made together.
        dtype: `float32`, `bfloat16`, ... or `auto` (the checkpoint's; float32 without a GPU).
        dial: compute dial of zero experts: the threshold of paired ones, or a bias on the logits of shared ones.
        template_args: variables for the chat template.
    """

    def __init__(
        self,
        folder: str,
        batch: int = 1,
        dtype: str = "auto",
        dial: float | None = None,
        template_args: dict[str, Any] | None = None,
    ):
        config = read_json(Path(folder) / "config.json")
        self.group, self.parallel = 1 if _rope_grows(config) else batch, 1
        self.tokenizer = load_tokenizer(folder, "hf", template_args=template_args)
        self.model = _load(folder, config, _dtype(dtype)).eval()
        self.device = self.model.device
        if dial is not None:
            _turn(self.model, config, dial, folder)
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        settings = {"dtype": str(self.model.dtype).removeprefix("torch."), "dial": dial}
        settings |= {"template_args": template_args or {}, "device": self.device.type}
        self.prompts = ChatPrompts(self.tokenizer)
        known = (
            fingerprint(folder),
            *extra_costs(config),
            settings,
            Origin.of_config(config),
            self.prompts.digest,
        )
        self.about = About(folder, config, *known)

    @torch.no_grad()
    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        prompts = [self.prompts.ids(r.messages) for r in requests]
        limits = [
            sampling.max_new_tokens
            if self.context is None
            else min(sampling.max_new_tokens, self.context - len(p))
            for p in prompts
        ]
        for request, prompt, limit in zip(requests, prompts, limits, strict=True):
            if limit < 1:
                raise UserError(
                    f"{request.name}: its prompt has {len(prompt)} tokens, the model's context {self.context}"
                )
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_id
        ids_BS, mask_BS = (part.to(self.device) for part in left_padded(prompts, pad))
        draw = _Draw(Sampler(sampling, [r.stream for r in requests], self.device), self.tokenizer.vocab_size)
        # What our settings leave open is filled from the model's: those become the same.
        self.model.generation_config = how = _settings(max(limits), self.tokenizer)
        with RowShares(self.model, len(requests)) as counted:
            made = self.model.generate(
                ids_BS,
                attention_mask=mask_BS,
                generation_config=how,
                logits_processor=[draw],
                stopping_criteria=[_RowLimits(longest, limits)],
            )
        answers = [
            until_stop(row[longest : longest + limit].tolist(), self.tokenizer.eos_ids)
            for row, limit in zip(made, limits, strict=True)
        ]
        shares = counted.shares([len(p) for p in prompts], [len(ids) for ids, _ in answers])
        return [
            Answer(self.prompts.text(r.messages, ids), len(ids), len(prompt), finish, share)
            for r, (ids, finish), prompt, share in zip(requests, answers, prompts, shares, strict=True)
        ]

    def slots(self) -> None:
        return None


def _settings(longest: int, tokenizer):
    """A generation config of ours: greedy, with a cache; nothing of the model's."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,  # the draw is made in `_Draw`
        use_cache=True,  # the shares are counted pass by pass
        eos_token_id=sorted(tokenizer.eos_ids),
        pad_token_id=tokenizer.pad_id,
    )


class _RowLimits:
    """A stopping criterion: each row ends at a limit of its own, whatever its neighbours' are."""

    def __init__(self, prompt: int, limits: list[int]):
        self.prompt, self.limits = prompt, limits

    def __call__(self, ids_BS: torch.Tensor, _, **__) -> torch.Tensor:
        made = ids_BS.shape[1] - self.prompt
        return torch.tensor([made >= limit for limit in self.limits], device=ids_BS.device)


class _Draw:
    """A logits processor that leaves one token: the one that was drawn for the row."""

    def __init__(self, sampler: Sampler, vocab_size: int):
        self.sampler, self.vocab_size = sampler, vocab_size

    def __call__(self, _, scores_BV: torch.Tensor) -> torch.Tensor:
        tokens_B, _ = self.sampler(scores_BV[:, : self.vocab_size], list(range(scores_BV.shape[0])))
        return torch.full_like(scores_BV, float("-inf")).scatter_(1, tokens_B[:, None], 0.0)


def _dtype(name: str):
    if name == "auto":
        return "auto" if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"--dtype {name}: no type of PyTorch; give float32, bfloat16, float16 or auto")
    return dtype


def _load(folder: str, config: dict, dtype):
    from transformers import AutoModelForCausalLM

    from ...serving.load import load_zero_expert_model

    # Several GPUs share the layers; that takes accelerate (extra `serve`).
    where = {"device_map": "auto"} if torch.cuda.device_count() > 1 else {}
    try:
        if config.get("zce_nums"):
            model = load_zero_expert_model(folder, dtype=dtype, **where)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **where)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {folder}: {str(error).strip().splitlines()[0]}") from error
    return model if where else model.to("cuda" if torch.cuda.is_available() else "cpu")


def _rope_grows(config: dict) -> bool:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type")) in _GROWING_ROPE


def _turn(model, config: dict, dial: float, folder: str) -> None:
    if not config.get("zce_nums"):
        raise UserError(f"--zero-dial {dial}: {folder} has no zero experts")
    paired = config.get("zce_routing") == "paired"
    try:
        (model.set_zero_threshold if paired else model.set_zero_logit_bias)(dial)
    except ValueError as error:
        raise UserError(f"--zero-dial {dial}: {error}") from None


def extra_costs(config: dict) -> tuple[float, float]:
    """What the zero experts of a folder cost; see `ZeroExpertConfig.costs`."""
    geometry = Geometry.from_config(config)
    return zero_experts_of(config).costs(geometry.hidden, geometry.topk, geometry.expert_width)


class RowShares:
    """Counts zero slots by row and position while a model of ours runs; a context manager.

    Args:
        model: a `ZeroExpertModel`, or any other model, which then has no zero slots.
        batch: rows.
    """

    def __init__(self, model, batch: int):
        self.batch = batch
        self.gates = [block.routing for block in model.moe_blocks()] if hasattr(model, "moe_blocks") else []
        self.counts_LBS: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.picks = 1

    def __enter__(self) -> RowShares:
        self.hooks = [gate.register_forward_hook(self._count(layer)) for layer, gate in enumerate(self.gates)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, layer: int):
        def hook(gate, _, output):
            ids_TK = output[2]
            self.picks = ids_TK.shape[1]
            zero_T = torch.zeros_like(ids_TK[:, 0]) if gate.dials.masked else (ids_TK >= gate.num_real).sum(1)
            self.counts_LBS[layer].append(zero_T.view(self.batch, -1))

        return hook

    def shares(self, prompt_lengths: list[int], answer_lengths: list[int]) -> list[float]:
        """Per row, over prompt and answer without the answer's last token, which was never fed.

        Prompts are padded on the left to the longest; what follows an answer's end does not count.
        """
        if not self.gates:
            return [0.0] * self.batch
        counts_LBS = torch.stack([torch.cat(steps, dim=1) for steps in self.counts_LBS]).cpu()
        longest, shares = max(prompt_lengths), []
        for row, (prompt, answer) in enumerate(zip(prompt_lengths, answer_lengths, strict=True)):
            fed = counts_LBS[:, row, longest - prompt : longest + max(answer - 1, 0)]
            shares.append(int(fed.sum()) / max(fed.numel() * self.picks, 1))
        return shares


def left_padded(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S] that end where the longest prompt ends, and which of them are real [B, S]."""
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask_BS = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids_BS, mask_BS


def until_stop(ids: list[int], stops: Collection[int]) -> tuple[list[int], str]:
    """An answer up to its end token, that included, and `stop`; or all of it and `length`."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[: place + 1], "stop"
    return ids, "length"
