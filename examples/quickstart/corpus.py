#!/usr/bin/env python
"""Build the quickstart's data: tokenizer, training chats, prompts for adaptation, held-out chats.

    python examples/quickstart/corpus.py --out DIR [--seed 1234] [--tokens 14000000]

The same seed gives the same files (prose and tasks on any machine, code per Python version). Everything is a
chat of one question and one answer; prose and code ask for the continuation of a passage.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tasks import FAMILIES, Task, generate
from texts import Document, fetch_prose, held_out, read_code
from tokenizer import render, train_tokenizer
from transformers import PreTrainedTokenizerFast

SHARES = {"prose": 0.25, "code": 0.25, "tasks": 0.50}
HEAD_WORDS = 24
HEAD_LINES = 3
CONTINUE = "Continue: "


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, help="folder of the downloaded prose (default: OUT/cache)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokens", type=int, default=30_000_000, help="size aimed at for train.jsonl")
    parser.add_argument("--max-length", type=int, default=256, help="longest sample in tokens")
    parser.add_argument("--vocab-size", type=int, default=2048, help="special tokens included")
    parser.add_argument("--prompts", type=int, default=4000, help="prompts for adaptation")
    parser.add_argument(
        "--heldout-texts", type=int, default=200, help="held-out passages, each of prose and code"
    )
    parser.add_argument("--heldout-tasks", type=int, default=100, help="held-out questions of each family")
    return parser.parse_args()


def chat(question: str, answer: str, kind: str, label: str | None = None) -> dict:
    """One sample as it is written."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind} | ({"label": label} if label is not None else {})


def split_passage(lines: list[str], kind: str) -> tuple[str, str] | None:
    """Head (what the user shows) and continuation; None when nothing is left to continue."""
    if kind == "code":
        head, rest = "\n".join(lines[:HEAD_LINES]), "\n".join(lines[HEAD_LINES:])
    else:
        text = "\n".join(lines)
        words = text.split(maxsplit=HEAD_WORDS)
        if len(words) <= HEAD_WORDS:
            return None
        rest = words[HEAD_WORDS]
        head = text[: len(text) - len(rest)].rstrip()
    return (head, rest) if len(rest.strip()) >= 40 else None


def passages(document: Document, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[dict]:
    """Cut a document at line ends into chats of at most `max_length` tokens."""
    lines = document.text.rstrip("\n").split("\n")
    # One for the newline, and the template around it all; the exact length is checked below.
    costs = [len(ids) + 1 for ids in tokenizer([line + "\n" for line in lines])["input_ids"]]
    room = max_length - 16
    samples, start = [], 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        stop, used = start, 0
        while stop < len(lines) and used + costs[stop] <= room:
            used += costs[stop]
            stop += 1
        if stop == start:  # one line longer than a sample
            start += 1
            continue
        pair = split_passage(_trim(lines[start:stop]), document.kind)
        if pair:
            sample = chat(CONTINUE + pair[0], pair[1], document.kind)
            if count_tokens(tokenizer, [sample])[0] <= max_length:
                samples.append(sample)
        start = stop
    return samples


def _trim(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def count_tokens(tokenizer: PreTrainedTokenizerFast, samples: list[dict]) -> list[int]:
    """Rendered length of each sample."""
    if not samples:
        return []
    return [len(ids) for ids in tokenizer([render(s["messages"]) for s in samples])["input_ids"]]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def task_chat(task: Task, labelled: bool = False) -> dict:
    return chat(task.question, task.answer, task.family, task.answer if labelled else None)


def as_prompt(sample: dict) -> dict:
    """A held-back sample as a prompt for adaptation: the question, and the answer as its label."""
    return {
        "prompt": sample["messages"][:1],
        "label": sample["messages"][1]["content"],
        "kind": sample["kind"],
    }


def take_tokens(samples: list[dict], lengths: list[int], budget: int) -> list[dict]:
    """The first samples that fit into `budget` tokens."""
    total, kept = 0, []
    for sample, length in zip(samples, lengths):
        if total + length > budget:
            break
        total += length
        kept.append(sample)
    return kept


def print_table(title: str, samples: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = defaultdict(list)
    for sample, length in zip(samples, count_tokens(tokenizer, samples)):
        lengths[sample["kind"]].append(length)
    print(f"\n{title:<26}{'samples':>9}{'tokens':>12}{'mean':>8}{'longest':>9}")
    for kind in sorted(lengths):
        n = lengths[kind]
        print(f"  {kind:<24}{len(n):>9,}{sum(n):>12,}{sum(n) / len(n):>8.1f}{max(n):>9}")
    everything = [n for lists in lengths.values() for n in lists]
    print(f"  {'all':<24}{len(everything):>9,}{sum(everything):>12,}")


def main() -> int:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)

    documents = fetch_prose(args.cache or args.out / "cache") + read_code()
    train_documents = [d for d in documents if not held_out(d, args.seed)]
    heldout_documents = [d for d in documents if held_out(d, args.seed)]
    if {d.kind for d in heldout_documents} != {"prose", "code"}:
        raise RuntimeError(f"seed {args.seed} holds back no document of one kind: choose another seed")

    # Held-out questions are drawn first, prompts next: no later set may repeat one of them.
    task_prompts = args.prompts // 2 // len(FAMILIES)
    heldout_tasks, prompt_tasks, seen = [], [], {family: set() for family in FAMILIES}
    for family in FAMILIES:
        heldout_tasks += islice(generate(family, args.seed + 1, seen[family]), args.heldout_tasks)
        prompt_tasks += islice(generate(family, args.seed + 2, seen[family]), task_prompts)

    # A first part of the tasks, with the documents, trains the tokenizer.
    wanted = int(args.tokens * SHARES["tasks"])
    sources = {family: generate(family, args.seed, seen[family]) for family in FAMILIES}
    train_tasks = {family: list(islice(source, 2_000)) for family, source in sources.items()}
    few = [t for tasks in train_tasks.values() for t in tasks]
    corpus = [d.text for d in train_documents] + [f"{t.question}\n{t.answer}" for t in few]
    tokenizer = train_tokenizer(corpus, args.vocab_size)
    tokenizer.save_pretrained(args.out / "tokenizer")

    train, spare = [], []
    for kind in ("prose", "code"):
        samples = [
            s for d in train_documents if d.kind == kind for s in passages(d, tokenizer, args.max_length)
        ]
        rng.shuffle(samples)
        spare += samples[: args.prompts // 4]
        train += take_tokens(samples, count_tokens(tokenizer, samples), int(args.tokens * SHARES[kind]))
    # Equally many questions of every family; one with few distinct questions gives all it has.
    means = {}
    for family, tasks in train_tasks.items():
        lengths = count_tokens(tokenizer, [task_chat(t) for t in tasks[:1_000]])
        means[family] = sum(lengths) / len(lengths)
    each = int(wanted / sum(means.values()))
    for family, tasks in train_tasks.items():
        tasks += islice(sources[family], max(0, each - len(tasks)))
        train += [task_chat(t) for t in tasks[:each]]
    rng.shuffle(train)
    write_jsonl(args.out / "train.jsonl", train)

    prompts = [as_prompt(s) for s in spare + [task_chat(t) for t in prompt_tasks]]
    rng.shuffle(prompts)
    write_jsonl(args.out / "prompts.jsonl", prompts)

    heldout = []
    for kind in ("prose", "code"):
        samples = [
            s for d in heldout_documents if d.kind == kind for s in passages(d, tokenizer, args.max_length)
        ]
        rng.shuffle(samples)
        heldout += [s | {"label": s["messages"][1]["content"]} for s in samples[: args.heldout_texts]]
    heldout += [task_chat(t, labelled=True) for t in heldout_tasks]
    write_jsonl(args.out / "heldout.jsonl", heldout)

    print(f"{args.out}: vocabulary {len(tokenizer)}, documents {len(train_documents)} train", end="")
    print(f" / {len(heldout_documents)} held out")
    print_table("train.jsonl", train, tokenizer)
    print_table("heldout.jsonl", heldout, tokenizer)
    kinds = [p["kind"] for p in prompts]
    print(
        f"\nprompts.jsonl {len(prompts):,}: " + ", ".join(f"{k} {kinds.count(k)}" for k in sorted(set(kinds)))
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
