"""Writes the table of docs/evidence/parallelism.md: `python tests/distributed/parity_table.py [--out FILE]`, or a part
of it, `--only a,b --update` (without `--update` it is printed alone).

Every row is a run of its own on CPU + gloo, three optimizer steps, compared with the same run in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from zeda_megatron.runtime import cpu  # noqa: E402

cpu.install()

import tiny_world  # noqa: E402
from cases import FAMILIES, FOUR_PROCESSES, STAGE_2, TRAIN  # noqa: E402
from runs import Alone, Runs, differences, make_worlds  # noqa: E402

from zeda_megatron.config.parallel import ParallelConfig  # noqa: E402
from zeda_megatron.runtime.process_groups import initialize  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "evidence" / "parallelism.md"
BEGIN, END = "<!-- parity table: begin -->", "<!-- parity table: end -->"
WORLDS = {
    "plain": "",
    "odd": "first layer dense, tied LM head",
    "deep": "four layers",
    "six": "six layers",
    "aligned": "",
    "aligned paired": "paired",
    "ce": "cross-entropy",
    "router": "routers train",
    "norms": "routers and norms train",
    "lora": "adapters and routers train",
    "glm lora": "GLM, adapters and routers train",
    "qwen3_next lora": "Qwen3-Next, adapters and routers train",
    "stage 2 lora": "stage 2, adapters and routers train",
    "reverse": "reverse KL",
    "jsd": "JSD",
    "adamoe": "AdaMoE's loss and weights",
    "rows": "mean over rows",
    "matched": "hidden states matched",
    "matched aligned": "hidden states matched",
    "matched deep": "hidden states matched, four layers",
    "matched paired": "hidden states matched, paired",
    "matched glm": "hidden states matched, GLM",
    "matched rows": "hidden states matched, mean over rows",
    "stage 2 matched": "stage 2, hidden states matched",
    "paired": "paired",
    "paired head": "paired, head trains",
    "awake": "paired, stand-ins",
    "awake aligned": "paired, stand-ins",
    "awake head": "paired, stand-ins, head trains",
    "stage 2": "stage 2, reverse KL",
    "stage 2 sampled": "stage 2, sampled reverse KL",
    "stage 2 replay": "stage 2, routing replay",
    "stage 2 paired": "stage 2, paired",
    "stage 2 rounds": "stage 2, one step in two on older answers",
    "stage 2 aligned": "stage 2, reverse KL",
    "stage 2 replay aligned": "stage 2, routing replay",
    "stage 2 deep": "stage 2, four layers",
    "stage 2 odd": "stage 2, first layer dense, tied LM head",
    "stage 2 replay odd": "stage 2, routing replay, first layer dense, tied LM head",
    "glm": "GLM",
    "glm aligned": "GLM",
    "stage 2 glm": "stage 2, GLM, reverse KL",
    "stage 2 glm aligned": "stage 2, GLM, reverse KL",
    "stage 2 replay glm": "stage 2, GLM, routing replay",
    "glm deep": "GLM, four layers",
    "stage 2 glm deep": "stage 2, GLM, four layers",
    "mtp": "GLM, head of multi-token prediction",
    "mtp paired": "GLM, head of multi-token prediction, paired",
    "stage 2 mtp": "stage 2, GLM, head of multi-token prediction",
    "evaluated": "held-out rows",
    "evaluated deep": "held-out rows, four layers",
    "evaluated aligned": "held-out rows",
    "evaluated paired": "held-out rows, paired",
}
NAMES = {
    "glm4_moe": "GLM-4.5",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v2": "DeepSeek-V2",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "MiniMax-M2",
    "olmoe": "OLMoE",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_moe_text": "Qwen3.5",
}
for family in FAMILIES:
    WORLDS |= {family: NAMES[family], f"{family} aligned": NAMES[family]}
    WORLDS |= {f"stage 2 {family}{more}": f"stage 2, {NAMES[family]}" for more in ("", " aligned")}
FLAGS = {
    "moe_token_dispatcher_type": "{} dispatcher",
    "recompute_granularity": "{} recomputation",
    "expert_backend": "{} over experts",
    "teacher_memory": "teacher {}",
    "teacher_schedule": "teacher {}",
    "use_distributed_optimizer": "distributed optimizer",
}

EVERY = [case for case in TRAIN + STAGE_2 + FOUR_PROCESSES if case["do"] == "train"]


def layout_of(case: dict) -> str:
    """`TP2 EP2`; the data-parallel size is what is left of the processes."""
    sizes = {name.upper(): size for name, size in case["layout"].items()}
    processes = 4 if case in FOUR_PROCESSES else 2
    rest = processes
    for name in ("TP", "PP", "CP"):
        rest //= sizes.get(name, 1)
    if rest > 1:
        sizes["DP"] = rest
    return " ".join(
        f"{name}{sizes[name]}" for name in ("DP", "TP", "ETP", "EP", "PP", "VPP", "CP") if name in sizes
    )


def note_of(case: dict) -> str:
    words = [WORLDS[case["world"]]]
    words += [
        f"{case['layout'][end]} on the {end} stage" for end in ("first", "last") if end in case["layout"]
    ]
    words += [FLAGS[key].format(value) for key, value in case["flags"].items() if key in FLAGS]
    return ", ".join(filter(None, words)) or "forward KL"


def head_of(case: dict) -> str:
    return f"| {layout_of(case)} | {note_of(case)} |"


def row_of(case: dict, found: dict[str, float]) -> str:
    keys = ("loss", "grad_norm", "gradients", "weights")
    return f"{head_of(case)} " + " | ".join(f"{found[key]:.0e}" for key in keys) + " |"


def merged(cases: list[dict], rows: list[str], written: list[str]) -> list[str]:
    """New rows, and written ones where there is none new, in the order of the cases."""
    heads = list(map(head_of, cases))
    found = {row.rsplit("|", 5)[0] + "|": row for row in [*written, *rows] if row.startswith("|")}
    return [found[head] for head in heads if head in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--only", help="comma-separated names of cases; prints the rows and writes nothing")
    parser.add_argument(
        "--update", action="store_true", help="with --only: write these rows, keep the others"
    )
    options = parser.parse_args()
    cases = EVERY
    if options.only:
        cases = [case for case in cases if case["name"] in options.only.split(",")]
        os.environ["ZEDA_CASES"] = options.only  # the processes run these alone
    initialize(ParallelConfig())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "runs").mkdir()
        worlds = make_worlds(folder, tiny_world.make_world(folder / "plain"))
        alone, runs = Alone(worlds, folder / "alone"), Runs(worlds, folder, folder / "runs")
        for case in cases:
            _, made = runs(case["name"])
            rows.append(row_of(case, differences(case, made, worlds, alone)))
            print(rows[-1], flush=True)
    if options.only and not options.update:
        return
    head = "| layout | run | loss | gradient norm | gradients | weights |\n|---|---|---|---|---|---|"
    about = f"megatron-core {version('megatron-core')}, torch {version('torch')}, fp32, gloo."
    text = options.out.read_text()
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    if options.update:
        rows = merged(EVERY, rows, written.splitlines())
    table = "\n".join([head, *rows])
    options.out.write_text(f"{before}{BEGIN}\n{about}\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
