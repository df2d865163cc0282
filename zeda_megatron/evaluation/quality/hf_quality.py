"""Quality of Hugging Face folders, as transformers serves them: distance to a teacher and to another folder.

zeda evaluate folders --teacher DIR --models DIR [DIR ...] --heldout FILE [--out FILE]

The figures are those of `quality.measure`, which takes Megatron checkpoints. Here a model is what its folder
says, so what happened to it after its export (quantisation) counts too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ...config.arguments import check_choices, parse, require
from ...config.run import Watched
from ...data.conversation import TokenSample
from ...data.tokenizers import ChatTokenizer, load_tokenizer
from ...durable_file import write_result
from ...ops.vocab_kl import token_metrics
from ...runtime.terminal import progress_bar, told
from ...serving.load import load_model
from ...text_table import markdown_table
from ..answering.transformers_engine import left_padded, until_stop
from ..benchmarks.checkable import exactly
from .heldout import Task, load_held_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class QualityOptions(Watched):
    """What to compare."""

    teacher: str | None = None
    """Folder of the static model; its tokenizer is used."""

    models: list[str] = field(default_factory=list)
    """Folders to measure; the first is the one that the others are compared with."""

    heldout: str | None = None
    """Held-out conversations, jsonl with messages, kind and label."""

    limit: int = 200
    """Conversations per kind."""

    seq_length: int = 2048
    """Longest conversation, in tokens."""

    max_new_tokens: int = 64
    """Longest answer to a task."""

    batch_size: int = 32
    """Conversations at a time."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type that all models compute in: fp32 or bf16."""

    out: str | None = None
    """JSON file for the result."""


@dataclass
class Sums:
    """Totals of one model over the tokens that are scored."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, log_p_TV: torch.Tensor, labels_T: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
        """Count T tokens. `others`: log-probabilities [T, V] that the model is compared with, by name."""
        self.values["tokens"] += labels_T.numel()
        for name, log_q_TV in others.items():
            found = token_metrics(log_p_TV, log_q_TV, labels_T)
            self.values[f"kl_to_{name}"] += float(found["kl"].double().sum())
            self.values[f"top1_agreement_{name}"] += float(found["top1_agreement"].sum())
        self.values["ce"] += float(found["ce"].double().sum())

    def means(self) -> dict[str, float]:
        """Per token."""
        tokens = self.values["tokens"]
        return {name: value / tokens for name, value in self.values.items() if name != "tokens"}


@torch.no_grad()
def quality(
    teacher: torch.nn.Module,
    models: dict[str, torch.nn.Module],
    samples: Sequence[TokenSample],
    tasks: Sequence[Task],
    tokenizer: ChatTokenizer,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Per model: `ce`, `kl_to_teacher`, `kl_to_first`, `top1_agreement_*`, `zero_share`, `exact_match`, all as in
    `quality.measure` (nats a token, means over response tokens).

    Args:
        models: by name; the first is what the others are compared with.
        progress: show a bar.
    """
    with progress_bar(len(samples) + len(models) * len(tasks), "conversation", "folders", progress) as bar:
        return _quality(teacher, models, samples, tasks, tokenizer, batch_size, max_new_tokens, bar.update)


def _quality(teacher, models, samples, tasks, tokenizer, batch_size, max_new_tokens, on_done) -> dict:
    sums = {name: Sums() for name in models}
    for model in models.values():
        _reset(model)
    ordered = sorted(samples, key=lambda sample: len(sample.tokens))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tokens_BS, mask_BS, scored_BS = _pad(batch, tokenizer.pad_id)
        labels_T = tokens_BS[:, 1:][scored_BS].to(teacher.device)
        others = {"teacher": _log_probs(teacher, tokens_BS, mask_BS, scored_BS)}
        for name, model in models.items():
            log_p_TV = _log_probs(model, tokens_BS, mask_BS, scored_BS)
            others.setdefault("first", log_p_TV)
            sums[name].add(log_p_TV, labels_T, others)
        on_done(len(batch))
    result = {}
    for name, model in models.items():
        shares = model.zero_share() if hasattr(model, "zero_share") else [0.0]
        right = exact_match(model, tasks, tokenizer, batch_size, max_new_tokens, on_done)
        result[name] = {
            **sums[name].means(),
            "zero_share": sum(shares) / len(shares),
            "exact_match": sum(right.values()) / len(right) if right else None,
        }
    return result


def _load(folder: str, dtype: str) -> torch.nn.Module:
    model = load_model(folder, dtype=DTYPES[dtype]).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _reset(model: torch.nn.Module) -> None:
    if hasattr(model, "reset_zero_share"):
        model.reset_zero_share()


def _pad(batch: Sequence[TokenSample], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, S], which of them are real [B, S], and which predict a token of the answer [B, S-1]."""
    longest = max(len(sample.tokens) for sample in batch)

    def rows(values: list[list], filler) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

    tokens_BS = rows([sample.tokens for sample in batch], pad_id)
    mask_BS = rows([[1] * len(sample.tokens) for sample in batch], 0)
    return tokens_BS, mask_BS, rows([sample.is_response for sample in batch], False)[:, 1:]


def _log_probs(model, tokens_BS, mask_BS, scored_BS) -> torch.Tensor:
    logits = model(tokens_BS.to(model.device), attention_mask=mask_BS.to(model.device)).logits
    return F.log_softmax(logits[:, :-1][scored_BS.to(model.device)].float(), dim=-1)


@torch.no_grad()
def exact_match(
    model: torch.nn.Module,
    tasks: Sequence[Task],
    tokenizer: ChatTokenizer,
    batch_size: int,
    max_new_tokens: int,
    on_done: Callable[[int], Any] = lambda count: None,
) -> dict[str, float]:
    """Share of right greedy answers per family; texts are stripped and compared."""
    hits, counts = defaultdict(int), defaultdict(int)
    ordered = sorted(tasks, key=lambda task: len(task.prompt_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids_BS, mask_BS = left_padded([task.prompt_ids for task in batch], tokenizer.pad_id)
        made_BS = model.generate(
            ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(tokenizer.eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        for task, row in zip(batch, made_BS[:, ids_BS.shape[1] :].tolist()):
            answer, finish = until_stop(row, tokenizer.eos_ids)
            text = tokenizer.decode(answer[:-1] if finish == "stop" else answer)
            counts[task.kind] += 1
            hits[task.kind] += exactly(text, task.label)
        on_done(len(batch))
    return {kind: hits[kind] / counts[kind] for kind in sorted(counts)}


COLUMNS = {
    "ce": ("held-out CE", "{:.4f}"),
    "kl_to_teacher": ("KL to teacher", "{:.4f}"),
    "kl_to_first": ("KL to the first", "{:.6f}"),
    "top1_agreement_first": ("same first choice", "{:.2%}"),
    "exact_match": ("exact match", "{:.1%}"),
    "zero_share": ("experts skipped", "{:.2%}"),
}


def table(result: dict[str, dict[str, float]]) -> list[str]:
    """Markdown lines, a model per line."""
    rows = [
        [name, *("" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items())]
        for name, row in result.items()
    ]
    return markdown_table(["", *(head for head, _ in COLUMNS.values())], rows)


def main(argv: list[str]) -> int:
    """Entry point: prints a table."""
    options = parse(argv, {"quality": QualityOptions}, prog="zeda evaluate folders")["quality"]
    require(options, "teacher", "models", "heldout")
    check_choices(options)
    tokenizer = load_tokenizer(options.teacher)
    held_out = load_held_out(options.heldout, tokenizer, options.seq_length, limit=options.limit)
    models = {folder: _load(folder, options.dtype) for folder in options.models}
    result = quality(
        _load(options.teacher, options.dtype),
        models,
        held_out.samples,
        held_out.tasks,
        tokenizer,
        options.batch_size,
        options.max_new_tokens,
        options.progress,
    )
    if options.out:
        write_result("--out", options.out, json.dumps(result, indent=2) + "\n")
    print("\n".join(table(result)))
    if options.out:
        told(f"wrote {options.out}")
    return 0
