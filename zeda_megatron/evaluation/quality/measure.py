"""Measure an arm against its teacher: held-out loss, distance to the teacher, right answers, zero share.

zeda evaluate distance --student DIR --teacher DIR --heldout FILE --out metrics.json

Several arms in one process, with `--arms FILE`: the teacher reads the held-out text once for all of them, and every
arm's figures are those, to the bit, that it gets alone.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...config.arguments import check_choices, parse, require
from ...config.generate import SamplingConfig
from ...config.run import LossConfig, Watched
from ...data.packing import PackedDataset, TokenSample
from ...distill.builtin_engine import BuiltinEngine
from ...distill.passes import compare, means, total
from ...distill.teacher import Remembered, Teacher
from ...durable_file import write_result
from ...errors import UserError
from ...models.load import load_model
from ...moe import stats
from ...moe.router_dials import set_dials
from ...moe.stats import evaluating
from ...regular_file import read_regular
from ...runtime import process_groups
from ...runtime.terminal import ending, progress_bar, told
from ..benchmarks.checkable import exactly
from .heldout import load_held_out, spread
from .scored_tokens import ScoredTokens, TokenClasses
from .tune import apply_rule, turn_dial

SHARED = ("teacher", "heldout", "limit", "seq_length")
"""Options that are the same for all arms of a process."""
MAX_ARMS_BYTES = 1 << 20


@dataclass(frozen=True)
class MeasureOptions(Watched):
    """What to measure."""

    teacher: str | None = None
    """Megatron checkpoint of the static model (or a widened one; its zero experts are masked)."""

    student: str | None = None
    """Megatron checkpoint of the arm. Default: the teacher itself."""

    mask: bool = False
    """Mask the student's zero experts (static model, for pick rules)."""

    moe_pick_rule: str | None = None
    """topk=2, skip=0.4 or top_p=0.7. `skip` and `top_p` without a number are tuned to --target-share."""

    zero_dial: str | None = None
    """The compute dial: the threshold of paired zero experts, or a number added to the logits of shared ones.
    `auto` tunes it to --target-share. Default: as the checkpoint has it."""

    paired_budget: Literal["model", "layer"] = "model"
    """For `--zero-dial auto` with paired zero experts: one threshold (model), or one per layer (layer)."""

    target_share: float = 0.5
    """Zero share that a rule or the dial is tuned to, on --calibration."""

    calibration: str | None = None
    """Rollout file that rules and dial are tuned on (never the held-out one)."""

    heldout: str | None = None
    """Held-out conversations, jsonl with messages, kind and label."""

    limit: int = 200
    """Conversations per kind."""

    seq_length: int = 2048
    """Tokens of a packed row."""

    max_new_tokens: int = 64
    """Longest answer to a task."""

    own_answers: int = 0
    """Also sample so many answers to held-out prompts from the student and tell its KL(student || teacher) on them."""

    own_answer_tokens: int = 160
    """Longest of these answers."""

    out: str | None = None
    """JSON file for the result."""

    arms: str | None = None
    """File with several arms to measure in one process: the flags of one a line, with an --out each, as this command
    takes them. They are added to those of the command line, which hold for all."""


def measure(
    student,
    teacher,
    held_out,
    vocab_size: int,
    tokenizer,
    seq_length: int,
    max_new_tokens: int,
    on_part: Callable[[], Any] = lambda: None,
) -> dict:
    """METRICS of the report (without adapt_*), plus `by_kind`, `zero_share_by_layer` and `tokens`.

    Args:
        student: bare model chunk, its mask and pick rule set as the arm wants them.
        teacher: `distill.teacher.Teacher`; may hold the same chunk.
        held_out: `heldout.HeldOut`.
        on_part: called for every row that is scored and every task that is answered.
    """
    from .token_skips import token_skips

    by_kind, layers, picks_2LN, tokens = {}, None, 0, {}
    sums, slots, zero, loaded = total([]), 0.0, 0.0, 0.0
    classes = TokenClasses(tokenizer, tokenizer.is_marker)
    for kind, rows in held_out.rows_by_kind.items():
        mine, report, picks, needs, tokens[kind] = _score(
            student, teacher, rows, vocab_size, seq_length, classes, on_part
        )
        picks_2LN = picks_2LN + picks
        routed = float(sum((~row.padding_mask).sum() for row in rows))
        sums, slots, zero = sums + mine, slots + routed, zero + routed * report.zero_share
        loaded += routed * needs
        shares = torch.tensor([math.nan if s is None else s for s in report.zero_share_by_layer])
        layers = shares * routed if layers is None else layers + shares * routed
        found = means(mine)
        by_kind[kind] = {"ce": found["ce"], "kl": found["kl"], "zero_share": report.zero_share}
    right = _right_answers(student, held_out.tasks, tokenizer, max_new_tokens, on_part)
    for kind, value in _by_family(held_out.tasks, right).items():
        by_kind[kind]["exact_match"] = value
    share, found = zero / slots, means(sums)
    return {
        "ce": found["ce"],
        "kl_to_teacher": found["kl"],
        "top1_agreement": found["top1_agreement"],
        **_answered(held_out.tasks, right),
        "zero_share": share,
        "expert_flops": 1.0 - share,
        "experts_loaded": loaded / slots,
        "by_kind": by_kind,
        "zero_share_by_layer": [None if math.isnan(s) else s for s in (layers / slots).tolist()],
        **_by_expert(*picks_2LN),
        "tokens": token_skips(tokens),
    }


def _by_expert(picks_LN: torch.Tensor, kept_LN: torch.Tensor) -> dict:
    """Share of every real expert's picks that were skipped, None without picks; nothing if none were skipped."""
    if torch.equal(picks_LN, kept_LN):
        return {}
    skipped_LN = (1 - kept_LN / picks_LN).tolist()
    return {
        "skipped_by_expert": [[None if math.isnan(s) else round(s, 4) for s in row] for row in skipped_LN]
    }


@torch.no_grad()
def _score(student, teacher, rows, vocab_size, seq_length, classes, on_part):
    """Sums over rows of one kind, their routing, the picks of every expert, the share of experts that tokens decoded
    together need, and what is known of every token."""
    layers, where = student.config.num_layers, process_groups.device()
    loss, compared = LossConfig("forward_kl"), []
    with stats.evaluating(student):
        stats.record(student)
        for row in rows:
            compared += compare([student], teacher, [row], seq_length, loss, vocab_size)
            on_part()
        skipped_RS = stats.take_skipped(student).view(len(rows), -1)
        picks = stats.collect_experts(student, layers, student.config.num_moe_experts, where)
        needs = stats.loaded_share(student)
        report = stats.collect(student, layers, where)
    head, teacher_head = student.head_weight(), teacher.head_weight()
    tokens = []
    for one, skipped_S in zip(compared, skipped_RS, strict=True):
        mine, theirs = (one.hidden.to(head.dtype), head), (one.teacher_hidden, teacher_head)
        tokens.append(ScoredTokens.of_row(one.row, skipped_S, mine, theirs, vocab_size, classes))
    return total([one.sums for one in compared]), report, torch.stack(picks), needs, ScoredTokens.join(tokens)


def _right_answers(student, tasks, tokenizer, max_new_tokens: int, on_part, slots: int = 64) -> list[bool]:
    """Whether each greedy answer is the right one, in the order of the tasks; judged as the benchmark `tasks` does."""
    length = max((len(task.prompt_ids) for task in tasks), default=0) + max_new_tokens
    engine = BuiltinEngine(
        student, tokenizer.eos_ids, tokenizer.pad_id, length, slots=slots, on_answer=on_part
    )
    greedy = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    made = engine.generate([task.prompt_ids for task in tasks], greedy, [0] * len(tasks))
    return [
        exactly(tokenizer.decode(one.response_ids), task.label) for task, one in zip(tasks, made, strict=True)
    ]


def _answered(tasks, right: list[bool]) -> dict:
    """`exact_match` (families count alike), its interval, and the single answers, for paired tests in the report."""
    from ..comparison.statistics import accuracy

    if not tasks:
        return {"exact_match": None}
    shares = _by_family(tasks, right).values()
    spread = accuracy([float(one) for one in right], len(right))
    return {
        "exact_match": sum(shares) / len(shares),
        "exact_match_interval": [spread.low, spread.high],
        "answers": "".join("01"[one] for one in right),
    }


def _by_family(tasks, right: list[bool]) -> dict[str, float]:
    # The mean over families is a sum in their order: of the shortest prompts first.
    groups: dict[str, list[bool]] = defaultdict(list)
    for task, one in sorted(zip(tasks, right), key=lambda pair: len(pair[0].prompt_ids)):
        groups[task.kind].append(one)
    return {kind: sum(some) / len(some) for kind, some in groups.items()}


def main(argv: list[str]) -> int:
    """Entry point. Writes the metrics to --out, or prints them."""
    first, *_ = arms = read_arms(argv)
    with process_groups.started():
        yardstick = Yardstick(first, len(arms) > 1)
        for options in arms:
            result = yardstick.measure_arm(options)
            text = json.dumps(result, indent=2)
            if options.out:
                write_result("--out", options.out, text + "\n")
                kl, share = result["kl_to_teacher"], result["zero_share"]
                export = f"zeda convert megatron-to-hf --megatron {options.student} exports it"
                then = export if options.student and not options.arms else ""
                told(ending(f"wrote {options.out}: KL {kl:.4f} at a zero share of {share:.1%}", then))
            else:
                print(text)
    return 0


def read_arms(argv: Sequence[str]) -> list[MeasureOptions]:
    """The arms of a command line: one, or those of its --arms file. Raises `UserError` naming the flag, or the line."""
    asked = _read(argv)
    if not asked.arms:
        return [asked]
    try:
        lines = read_regular(asked.arms, MAX_ARMS_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--arms {asked.arms}: cannot be read ({error})") from None
    arms = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            arm = _read([*argv, *words])
        except (UserError, ValueError) as error:
            raise UserError(f"--arms {asked.arms} line {number}: {error}") from None
        for name in ("arms", *SHARED):
            if getattr(arm, name) != getattr(asked, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"--arms {asked.arms} line {number}: {flag} is one for all arms; give it on the command line"
                )
        if arm.out is None or arm.out in [other.out for other in arms]:
            raise UserError(f"--arms {asked.arms} line {number}: needs an --out of its own")
        arms.append(arm)
    if not arms:
        raise UserError(f"--arms {asked.arms}: names no arm; write the flags of one a line")
    return arms


def _read(argv: Sequence[str]) -> MeasureOptions:
    options = parse(argv, {"measure": MeasureOptions}, prog="zeda evaluate distance")["measure"]
    require(options, "teacher", "heldout")
    check_choices(options)
    return options


def measure_arm(options: MeasureOptions) -> dict:
    """Load teacher and student, tune the rule if asked to, measure."""
    return Yardstick(options).measure_arm(options)


class Yardstick:
    """What arms are measured with: a teacher and held-out text, read once.

    Args:
        options: of any arm; all have the same `SHARED`.
        several: arms are to come: what the teacher says of the text is kept (in host memory), and every arm has a model
            of its own.
    """

    def __init__(self, options: MeasureOptions, several: bool = False):
        self.several, self.model = several, load_model(options.teacher)
        self.tokenizer = self.model.tokenizer
        chunks = [self.model.chunk]
        self.held_out = load_held_out(
            options.heldout, self.tokenizer, options.seq_length, limit=options.limit
        )
        rows = [row for some in self.held_out.rows_by_kind.values() for row in some]
        self.teacher = Remembered(chunks, rows) if several else Teacher(chunks, "own")

    def measure_arm(self, options: MeasureOptions) -> dict:
        """Load the student, tune its rule if asked to, measure."""
        own = options.student or (options.teacher if self.several else None)
        student = (load_model(own) if own else self.model).chunk
        held_out, tokenizer = self.held_out, self.tokenizer
        set_dials(student, zero_mask=options.mask)
        rule = apply_rule(student, options, tokenizer)
        dial = turn_dial(student, options, tokenizer) if options.zero_dial else {}
        prompts = spread(held_out.prompts, options.own_answers)
        parts = sum(map(len, held_out.rows_by_kind.values())) + len(held_out.tasks) + len(prompts)
        title = Path(options.student or options.teacher).name
        with progress_bar(parts, "row or answer", title, options.progress) as bar:
            result = measure(
                student,
                self.teacher,
                held_out,
                self.model.arch.vocab_size,
                tokenizer,
                options.seq_length,
                options.max_new_tokens,
                bar.update,
            )
            if options.own_answers:
                lengths = options.seq_length, options.own_answer_tokens
                result["own_answers"] = own_answers(
                    student, self.teacher, prompts, tokenizer, *lengths, bar.update
                )
        head, stand_in = extra_costs(student)
        result["expert_flops"] += head + result["zero_share"] * stand_in
        costs = {"head_flops": head, "stand_in_flops": stand_in}
        more = {key: cost for key, cost in costs.items() if cost}
        return {**result, **dial, **({"rule": rule} if rule else {}), **more}


def extra_costs(student) -> tuple[float, float]:
    """What the zero experts of a model cost; see `ZeroExpertConfig.costs`."""
    config, found = student.config, next(iter(stats.routers(student)))
    return found.zero.costs(config.hidden_size, config.moe_router_topk, config.moe_ffn_hidden_size)


SLOTS = 128
"""Answers under way at a time."""


@torch.no_grad()
def own_answers(
    student,
    teacher: Teacher,
    prompts: list[list[int]],
    tokenizer,
    seq_length: int,
    max_new_tokens: int,
    on_answer: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Sample one answer per prompt at temperature 1 and score it with both models.

    Args:
        student: bare model chunk, its mask and pick rule set as the arm wants them.
        prompts: token ids.

    Returns:
        `reverse_kl`: KL(student || teacher), exact over the vocabulary that is sampled from, mean over the answers'
        tokens, nats; `tokens`; `response_length`: mean.
    """
    prompts = [prompt for prompt in prompts if len(prompt) < seq_length]
    vocab = min(tokenizer.vocab_size, student.head_weight().shape[0])
    stops, pad = tokenizer.eos_ids, tokenizer.pad_id
    engine = BuiltinEngine(student, stops, pad, seq_length, vocab, SLOTS, on_answer)
    made = engine.generate(prompts, SamplingConfig(max_new_tokens), list(range(len(prompts))))
    samples = [
        TokenSample(prompt + one.response_ids, [False] * len(prompt) + [True] * len(one.response_ids))
        for prompt, one in zip(prompts, made, strict=True)
    ]
    data = PackedDataset(samples, seq_length, tokenizer.pad_id, seed=0)
    rows = [data[row] for row in range(data.rows_in_epoch(0))]
    with evaluating(student):
        compared = compare([student], teacher, rows, seq_length, LossConfig("reverse_kl"), vocab)
    found = means(total([row.sums for row in compared]))
    return {
        "reverse_kl": found["loss"],
        "tokens": found["tokens"],
        "response_length": found["tokens"] / len(made),
    }
