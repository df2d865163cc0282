"""Second data set of the teacher: the task families that are still weak, and a share of everything else.

python examples/quickstart/focus.py --train CORPUS/train.jsonl --out CORPUS/focus.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

WEAK = ("number_filtering", "needle_haystack", "family_relationships", "chain_sum")
"""Below 80% after the first phase."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="train.jsonl of corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--rest", type=float, default=0.25, help="share of the other kinds that is kept")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kept = 0
    with args.train.open(encoding="utf-8") as source, args.out.open("w", encoding="utf-8") as target:
        for line in source:
            if json.loads(line)["kind"] in WEAK or rng.random() < args.rest:
                target.write(line)
                kept += 1
    print(f"{args.out}: {kept:,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
