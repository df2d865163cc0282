"""Held-out conversations: text to score, and questions with one right answer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ...data.conversation import TokenSample, tokenize_rollout
from ...data.packing import PackedBatch, PackedDataset
from ...data.prompts import load_rollouts
from ...data.tokenizers import ChatTokenizer
from ...errors import UserError
from ..benchmarks.checkable import TEXT_KINDS


@dataclass(frozen=True)
class Task:
    """A question whose answer can be checked."""

    kind: str
    """Family."""
    prompt_ids: list[int]
    """Tokens up to where the answer begins."""
    label: str
    """The right answer; compared after stripping."""


@dataclass(frozen=True)
class HeldOut:
    """What an arm is measured on."""

    rows_by_kind: dict[str, list[PackedBatch]] = field(repr=False)
    """Packed rows, each of one kind of text."""
    tasks: list[Task] = field(repr=False)
    """Checkable questions."""
    prompts: list[list[int]] = field(default_factory=list, repr=False)
    """Token ids of all prompts, of texts too."""
    samples: list[TokenSample] = field(default_factory=list, repr=False)
    """The conversations, each alone."""


def load_held_out(
    file: str,
    tokenizer: ChatTokenizer,
    seq_length: int,
    text_kinds: tuple[str, ...] = TEXT_KINDS,
    limit: int | None = None,
) -> HeldOut:
    """Read a rollout file (`messages`, `kind`, `label`).

    Args:
        text_kinds: kinds that are free text: scored, but not checked for a right answer.
        limit: at most so many conversations per kind.

    Raises:
        UserError: no such file, a bad line, or a conversation longer than a row.
    """
    samples: dict[str, list[TokenSample]] = defaultdict(list)
    tasks, prompts = [], []
    for number, rollout in enumerate(load_rollouts(file), 1):
        if limit is not None and len(samples[rollout.kind]) >= limit:
            continue
        sample = tokenize_rollout(rollout, tokenizer)
        if len(sample.tokens) > seq_length:
            raise UserError(
                f"{file} line {number}: {len(sample.tokens)} tokens, more than a row of {seq_length}"
            )
        samples[rollout.kind].append(sample)
        prompt = tokenizer.chat_ids(rollout.messages[:-1], add_generation_prompt=True)
        prompts.append(prompt)
        if rollout.kind not in text_kinds and rollout.label is not None:
            tasks.append(Task(rollout.kind, prompt, str(rollout.label).strip()))
    rows = {}
    for kind, some in samples.items():
        packed = PackedDataset(some, seq_length, tokenizer.pad_id, seed=0)
        rows[kind] = [packed[i] for i in range(packed.rows_in_epoch(0))]
    return HeldOut(rows, tasks, prompts, [sample for some in samples.values() for sample in some])


def spread(items: list, number: int) -> list:
    """`number` of them at most, from all over the list."""
    return items[:: max(len(items) // max(number, 1), 1)][:number]
