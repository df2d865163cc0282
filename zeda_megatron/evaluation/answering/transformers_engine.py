"""A model folder opened with transformers: ours with zero experts, the authors', or a static one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...data.tokenizers import load_tokenizer
from ...distill.sampling import Sampler, SamplingConfig
from ...errors import UserError
from ...strict_json import read_json
from ..left_padding import left_padded, until_stop
from .engine import About, Answer, Request
from .fingerprint import fingerprint
from .row_shares import RowShares


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
        self.group, self.parallel = batch, 1
        config = read_json(Path(folder) / "config.json")
        self.tokenizer = load_tokenizer(folder, "hf", template_args=template_args)
        self.model = _load(folder, config, _dtype(dtype)).eval()
        self.device = self.model.device
        if dial is not None:
            _turn(self.model, dial, folder)
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        settings = {"dtype": str(self.model.dtype).removeprefix("torch."), "dial": dial}
        settings["template_args"] = template_args or {}
        self.about = About(folder, config, fingerprint(folder), head_flops(config), settings)

    @torch.no_grad()
    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        from transformers import GenerationConfig

        prompts = [self.tokenizer.chat_ids(r.messages, add_generation_prompt=True) for r in requests]
        longest = max(map(len, prompts))
        new = (
            sampling.max_new_tokens
            if self.context is None
            else min(sampling.max_new_tokens, self.context - longest)
        )
        if new < 1:
            worst = requests[max(range(len(prompts)), key=lambda i: len(prompts[i]))].name
            raise UserError(f"{worst}: its prompt has {longest} tokens, the model's context {self.context}")
        pad = self.tokenizer.pad_id
        ids_BS, mask_BS = (part.to(self.device) for part in left_padded(prompts, pad))
        draw = _Draw(Sampler(sampling, [r.stream for r in requests], self.device), self.tokenizer.vocab_size)
        how = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,  # the draw is made in `_Draw`
            eos_token_id=sorted(self.tokenizer.eos_ids),
            pad_token_id=pad,
        )
        with RowShares(self.model, len(requests)) as counted:
            made = self.model.generate(
                ids_BS, attention_mask=mask_BS, generation_config=how, logits_processor=[draw]
            )
        answers = [until_stop(row[longest:].tolist(), self.tokenizer.eos_ids) for row in made]
        shares = counted.shares([len(p) for p in prompts], [len(ids) for ids, _ in answers])
        return [
            Answer(self.tokenizer.decode(ids), len(ids), len(prompt), finish, share)
            for (ids, finish), prompt, share in zip(answers, prompts, shares, strict=True)
        ]

    def slots(self) -> None:
        return None


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


def _turn(model, dial: float, folder: str) -> None:
    if not hasattr(model, "set_zero_threshold"):
        raise UserError(f"--zero-dial {dial}: {folder} has no zero experts")
    try:
        model.set_zero_threshold(dial)
    except ValueError:
        model.set_zero_logit_bias(dial)


def head_flops(config: dict) -> float:
    """Cost of the heads of paired zero experts (see `measure.head_cost`)."""
    if config.get("zce_routing") != "paired" or "head" not in config.get("zce_score", "head"):
        return 0.0
    from ..geometry import Geometry

    geometry = Geometry.from_config(config)
    return geometry.experts / (3 * geometry.topk * geometry.expert_width)
