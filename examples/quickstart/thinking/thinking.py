"""A small model that thinks before it answers, and what skipping in one phase or the other costs.

    python examples/quickstart/thinking/thinking.py data --out DIR
    python examples/quickstart/thinking/thinking.py measure --hf DIR --heldout FILE [--out FILE]

Three families of the quickstart whose answers can be worked out in steps. An answer is `^ the steps ~ the answer`: the
two marks stand for <think> and </think>, which the tokenizer of the quickstart's teacher does not have.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from corpus import chat
from tasks import Task, chunk_of

BEGIN, END = "^", "~"


def chain_sum(about: dict) -> str:
    """`98 + 93`: ones, tens, and what is carried; a difference is turned so that it does not go below zero."""
    a, sign, b = about["expression"].split()
    a, b = int(a), int(b)
    if sign == "+":
        ones, tens = a % 10 + b % 10, a // 10 + b // 10
        return f"{a % 10} + {b % 10} = {ones} , {a // 10} + {b // 10} = {tens} , {tens} 0 + {ones}"
    big, small = max(a, b), min(a, b)
    turned = "turned " if b > a else ""
    return f"{turned}{big} - {small // 10} 0 = {big - small // 10 * 10} , - {small % 10}"


def number_filtering(about: dict) -> str:
    """Every number with what becomes of it."""
    kept = set(about["result"])
    return " , ".join(f"{number} {'yes' if number in kept else 'no'}" for number in about["original_numbers"])


def word_sequence_reversal(about: dict) -> str:
    """The words with their places."""
    return " , ".join(f"{place} {word}" for place, word in enumerate(about["words"], 1))


STEPS = {
    "chain_sum": chain_sum,
    "number_filtering": number_filtering,
    "word_sequence_reversal": word_sequence_reversal,
}


def samples(family: str, seed: int, seen: set[str]) -> Iterator[tuple[Task, str]]:
    """Tasks whose question is not in `seen`, adding it, and what a model that thinks says to them."""
    for chunk in range(100):
        for task, about in chunk_of(family, seed, chunk, seen):
            yield task, f"{BEGIN} {STEPS[family](about)} {END} {task.answer}"


def thoughtful(task: Task, told: str) -> dict:
    return chat(task.question, told, task.family, task.answer)


def write_data(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    held, train = [], []
    for family in STEPS:
        seen: set[str] = set()
        made = samples(family, args.seed, seen)
        held += [thoughtful(*one) for one in islice(made, args.heldout)]
        train += [thoughtful(*one) for one in islice(made, args.train)]
    random.Random(args.seed).shuffle(train)
    for name, lines in (("heldout", held), ("train", train), ("rollouts", train[: args.rollouts])):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(lines):,} samples")


@torch.no_grad()
def answers(
    model, tokenizer, tasks: list[dict], inside: float, outside: float, batch: int = 50
) -> tuple[float, float]:
    """Share of right answers, and of picks that were skipped while answering (prompts are read under the own dial)."""
    begin, end = (tokenizer.convert_tokens_to_ids(mark) for mark in (BEGIN, END))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    right = zero = slots = 0
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        asked = [
            tokenizer.apply_chat_template(task["messages"][:1], add_generation_prompt=True, tokenize=False)
            for task in part
        ]
        inputs = tokenizer(
            asked, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        model.set_zero_dials(None)
        model.reset_zero_share()
        model(**inputs)
        prompt = [(int(block.zero_slots), int(block.all_slots)) for block in model.moe_blocks()]
        model.reset_zero_share()
        phase = model.zero_dial_by_phase(begin, end, inside=inside, outside=outside)
        made = model.generate(
            **inputs,
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop,
            logits_processor=[phase],
        )
        for block, (zero_before, before) in zip(model.moe_blocks(), prompt):
            zero += int(block.zero_slots) - zero_before
            slots += int(block.all_slots) - before
        for task, row in zip(part, made[:, inputs["input_ids"].shape[1] :].tolist()):
            row = row[: row.index(stop)] if stop in row else row
            told = tokenizer.decode(row[row.index(end) + 1 :]) if end in row else ""
            right += told.strip() == task["label"]
    return right / len(tasks), zero / slots


def measure(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from zeda_megatron.serving.load import load_model

    tokenizer = AutoTokenizer.from_pretrained(args.hf)
    model = load_model(args.hf, dtype=torch.float32).eval()
    tasks = [json.loads(line) for line in args.heldout.read_text(encoding="utf-8").splitlines()][
        :: args.every
    ]
    full, rows = -1e3, []
    ways = [("full", full, full), ("uniform", None, None), ("think cheap, answer full", None, full)]
    ways.append(("think full, answer cheap", full, None))
    for name, inside, outside in ways:
        for dial in args.dials if None in (inside, outside) else (0.0,):
            pair = [dial if side is None else side for side in (inside, outside)]
            exact, share = answers(model, tokenizer, tasks, *pair)
            rows.append({"way": name, "dial": dial, "share": share, "exact_match": exact})
            print(f"{name} {dial:+.2f}: {share:.1%} skipped, {exact:.1%} right", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", allow_abbrev=False)
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--train", type=int, default=16000, help="samples of each family")
    data.add_argument("--rollouts", type=int, default=6000)
    data.add_argument("--heldout", type=int, default=200, help="questions of each family")
    data.add_argument("--seed", type=int, default=77)
    figures = commands.add_parser("measure", allow_abbrev=False)
    figures.add_argument("--hf", required=True)
    figures.add_argument("--heldout", type=Path, required=True)
    figures.add_argument("--dials", type=float, nargs="+", default=[-0.5, 0.0, 0.5, 1.0, 1.5])
    figures.add_argument("--every", type=int, default=1, help="take every so many questions")
    figures.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_data(args) if args.command == "data" else measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
