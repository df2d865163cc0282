"""Data of the teacher's later phases: more of the task families that are still weak, and a share of the rest.

    python examples/quickstart/focus.py --corpus CORPUS --out CORPUS/focus.jsonl
    python examples/quickstart/focus.py --corpus CORPUS --out CORPUS/fresh.jsonl --fresh 60000 \
        --families number_filtering,needle_haystack,family_relationships --rest 0.3

The first keeps what train.jsonl has of the weak families; the second draws new questions of them, none of which is
in train.jsonl, prompts.jsonl or heldout.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from itertools import islice
from pathlib import Path

from corpus import task_chat
from tasks import FAMILIES, generate

WEAK = ("number_filtering", "needle_haystack", "family_relationships", "chain_sum")
"""Below 80% after the first phase."""


def questions(corpus: Path) -> set[str]:
    """Every question that a file of the corpus holds."""
    asked = set()
    for name in ("train", "prompts", "heldout"):
        with (corpus / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                asked.add((sample.get("prompt") or sample["messages"])[0]["content"])
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--families", default=",".join(WEAK), help="comma-separated families to take in full")
    parser.add_argument(
        "--fresh", type=int, default=0, help="new questions of each, in place of the known ones"
    )
    parser.add_argument("--rest", type=float, default=0.25, help="share of the other kinds that is kept")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    families = args.families.split(",")
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"--families: {sorted(unknown)[0]!r} is unknown; choose among {', '.join(FAMILIES)}")
    rng = random.Random(args.seed)
    lines = []
    with (args.corpus / "train.jsonl").open(encoding="utf-8") as source:
        for line in source:
            if json.loads(line)["kind"] in families:
                if not args.fresh:
                    lines.append(line)
            elif rng.random() < args.rest:
                lines.append(line)
    if args.fresh:
        seen = questions(args.corpus)
        for family in families:
            tasks = islice(generate(family, args.seed + 3, seen), args.fresh)
            lines += [json.dumps(task_chat(task), ensure_ascii=False) + "\n" for task in tasks]
        rng.shuffle(lines)
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {len(lines):,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
