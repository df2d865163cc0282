"""How many drafts of a multi-token-prediction head are accepted: teacher, student with the old head, with its own.

zeda evaluate drafts --teacher DIR --student DIR --heldout FILE --out drafts.json

A head drafts one token a step, greedily: after token t+1 is known, it says what t+2 is, and the model, which then runs
on both, keeps the draft if it is its own first choice. Acceptance is the share of kept drafts.

On held-out text every response token is such a step, whatever the model would have written. On a model's own greedy
answers the steps follow one another as in an engine: a kept draft saves the next one. One process, fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...config.arguments import Count, Whole, check_choices, parse, require
from ...config.generate import SamplingConfig
from ...config.run import LossConfig, Watched
from ...data.packing import PackedBatch, PackedDataset, TokenSample
from ...distill.builtin_engine import BuiltinEngine
from ...distill.passes import draft_loss, draft_states, forward_model, means, total
from ...durable_file import write_result
from ...errors import UserError
from ...models.load import LoadedModel, load_model
from ...moe import stats
from ...moe.router_dials import set_dials
from ...runtime import process_groups
from ...runtime.terminal import progress_bar, told
from ...text_table import text_table
from .heldout import HeldOut, load_held_out, spread

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time."""
SLOTS = 64
"""Answers under way at a time."""


@dataclass(frozen=True)
class DraftOptions(Watched):
    """What to measure."""

    teacher: str | None = None
    """Megatron checkpoint of the teacher, converted with --mtp; zero experts are masked, its head is the old one."""

    student: str | None = None
    """Megatron checkpoint of the arm. Without a head of its own, only the old one is measured on it. Default: the
    teacher alone."""

    heldout: str | None = None
    """Held-out conversations, jsonl with messages, kind and label."""

    limit: Count = 200
    """Conversations per kind."""

    seq_length: Count = 2048
    """Tokens of a packed row."""

    own_answers: Whole = 0
    """Also let each model answer so many held-out prompts greedily, and count the steps."""

    own_answer_tokens: Count = 160
    """Longest of these answers."""

    out: str | None = None
    """JSON file for the result."""


def main(argv: list[str]) -> int:
    """Entry point. Prints a table and writes the figures to --out."""
    options = parse(argv, {"drafts": DraftOptions}, prog="zeda evaluate drafts")["drafts"]
    require(options, "teacher", "heldout")
    check_choices(options)
    with process_groups.started():
        result = measure_drafts(options)
    if options.out:
        write_result("--out", options.out, json.dumps(result, indent=2) + "\n")
    print("\n".join(format_drafts(result)))
    if options.out:
        told(f"wrote {options.out}")
    return 0


def measure_drafts(options: DraftOptions) -> dict[str, dict]:
    """Who drafts for whom -> `acceptance` on held-out text, `accepted_length` (tokens a step), `kl` (KL(model || draft)
    in nats), `tokens`, `by_kind`, `zero_share`, and with --own-answers `own_answers`.

    Raises `UserError` for a teacher without a head.
    """
    teacher = load_model(options.teacher, mtp=True)
    if not teacher.arch.mtp_layers:
        raise UserError(
            f"--teacher {options.teacher}: has no head of multi-token prediction; convert the model with --mtp"
        )
    held_out = load_held_out(options.heldout, teacher.tokenizer, options.seq_length, limit=options.limit)
    set_dials(teacher.chunk, zero_mask=True)
    old = teacher.chunk.mtp.layers[0]
    pairs = {"teacher": (teacher, old)}
    if options.student:
        student = load_model(options.student, mtp=True)
        pairs["student, old head"] = (student, old)
        if student.arch.mtp_layers:
            pairs["student, its own head"] = (student, student.chunk.mtp.layers[0])
    answered: dict[int, list[PackedBatch]] = {}
    result = {}
    rows = len(pairs) * sum(map(len, held_out.rows_by_kind.values()))
    asked = spread(held_out.prompts, options.own_answers)
    asked = [prompt for prompt in asked if len(prompt) < options.seq_length]
    answers = len({id(model) for model, _ in pairs.values()}) * len(asked)
    with progress_bar(rows + answers, "row or answer", "drafts", options.progress) as bar:
        for name, (model, head) in pairs.items():
            result[name] = on_text(model.chunk, head, held_out, model.arch.vocab_size, bar.update)
            if options.own_answers:
                if id(model) not in answered:
                    answered[id(model)] = _answers(model, asked, options, bar.update)
                result[name]["own_answers"] = on_own_answers(model.chunk, head, answered[id(model)])
    return result


@torch.no_grad()
def on_text(
    model, head, held_out: HeldOut, vocab_size: int, on_row: Callable[[], Any] = lambda: None
) -> dict:
    """Acceptance on held-out text.

    Args:
        model: bare chunk that decides. head: an `MTPHead`, its own or another's; embedding and LM head are the model's,
            as engines that draft have it.
    """
    sums, by_kind, loss = total([]), {}, LossConfig("forward_kl", chunk_tokens=CHUNK_TOKENS)
    with stats.evaluating([model, head]):
        for kind, rows in held_out.rows_by_kind.items():
            mine = []
            for row in rows:
                hidden = forward_model(model, row)
                drafted = draft_states(model, row, hidden, head)
                theirs = hidden, model.head_weight()
                mine.append(draft_loss(model, row, drafted, theirs, loss, vocab_size)[1])
                on_row()
            by_kind[kind] = means(total(mine))["top1_agreement"]
            sums = sums + total(mine)
        share = stats.collect(model, model.config.num_layers, process_groups.device()).zero_share
    found = means(sums)
    return {
        "acceptance": found["top1_agreement"],
        "accepted_length": 1.0 + found["top1_agreement"],
        "kl": found["kl"],
        "tokens": found["tokens"],
        "zero_share": share,
        "by_kind": by_kind,
    }


@torch.no_grad()
def on_own_answers(model, head, rows: list[PackedBatch]) -> dict:
    """Acceptance while `model` writes the answers in these rows, with one draft of `head` a step.

    Returns:
        `accepted_length`: tokens a step (the first token of an answer comes with its prompt); `acceptance` of the
        drafts that were made; `answers`; `steps`.
    """
    tokens = steps = kept = answers = 0
    with stats.evaluating([model, head]):
        for row in rows:
            drafted = draft_states(model, row, forward_model(model, row), head)
            choice_S = first_choices(drafted.flatten(0, 1), model.head_weight())
            right_S = choice_S[:-1] == row.labels[0, 1:].to(choice_S.device)
            ends, asked_S = row.cu_seqlens.tolist(), row.loss_mask[0] > 0
            for start, end in zip(ends, ends[1:]):
                places = (start + asked_S[start:end].nonzero()[:, 0]).tolist()
                if len(places) < 2:
                    continue
                walked, good = walk(right_S[places[0] : places[-1]].tolist())
                steps, kept = steps + walked, kept + good
                tokens, answers = tokens + len(places) - 1, answers + 1
    return {
        "accepted_length": tokens / max(steps, 1),
        "acceptance": kept / max(steps, 1),
        "answers": answers,
        "steps": steps,
    }


def walk(right: list[bool]) -> tuple[int, int]:
    """Steps that an answer takes, and drafts that were kept.

    Args:
        right: for each token of the answer but the first, whether the draft of it would be right.
    """
    place = steps = kept = 0
    while place < len(right):
        steps, kept = steps + 1, kept + right[place]
        place += 1 + right[place]
    return steps, kept


def first_choices(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """The most probable token of each state, [T] int64; logits of `CHUNK_TOKENS` states at a time."""
    return torch.cat([(part @ weight_VH.t()).argmax(-1) for part in hidden_TH.split(CHUNK_TOKENS)])


def _answers(
    model: LoadedModel, prompts: list[list[int]], options: DraftOptions, on_answer: Callable[[], Any]
) -> list[PackedBatch]:
    """Rows with the greedy answers of a model to these prompts."""
    tokenizer = model.tokenizer
    vocab = min(tokenizer.vocab_size, model.arch.vocab_size)
    stops, pad = tokenizer.eos_ids, tokenizer.pad_id
    engine = BuiltinEngine(model.chunk, stops, pad, options.seq_length, vocab, SLOTS, on_answer)
    greedy = SamplingConfig(options.own_answer_tokens, temperature=0.0)
    made = engine.generate(prompts, greedy, [0] * len(prompts))
    samples = [
        TokenSample(prompt + one.response_ids, [False] * len(prompt) + [True] * len(one.response_ids))
        for prompt, one in zip(prompts, made, strict=True)
    ]
    data = PackedDataset(samples, options.seq_length, tokenizer.pad_id, seed=0)
    return [data[row] for row in range(data.rows_in_epoch(0))]


def format_drafts(result: dict[str, dict]) -> list[str]:
    """Lines of a table."""
    rows = [["drafts for", "acceptance", "tokens a step", "KL", "zero share"]]
    own = any("own_answers" in found for found in result.values())
    rows[0] += ["own answers", "tokens a step"] if own else []
    for name, found in result.items():
        row = [name, f"{found['acceptance']:.2%}", f"{found['accepted_length']:.4f}", f"{found['kl']:.4f}"]
        row.append(f"{found['zero_share']:.2%}")
        if own:
            answers = found["own_answers"]
            row += [f"{answers['acceptance']:.2%}", f"{answers['accepted_length']:.4f}"]
        rows.append(row)
    return text_table(rows)
