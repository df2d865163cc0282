"""How good a decision could be: the heads of paired zero experts beside an oracle that knows what every pick does.

    zeda evaluate oracle --students FIT [FIT...] --teacher DIR --data-path ROLLOUTS

All decisions skip the same share of the same rows' picks. For the oracle several answers are sampled at every
position, and z_i, the slope of their log-probability along pick i's output w_i E_i(x), says what the pick does: the
mean of z_i^2 over the answers is twice the KL divergence, to second order, if that pick alone is skipped. Gradients
see later tokens, which no head can: the oracle is a bound, not a method. Picks that are skipped together act together:
`greedy` takes, pick after pick, the one with the least mean of (z of all picks taken so far)^2, within a layer's pass
over a token or over all layers of a token. As for the fit, f times the layer's sensitivity times |w_i E_i(x)| counts
beside z_i: without this floor skipping many picks at once spoils the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config.arguments import Amount, Count, Share, parse, require
from ...config.run import Watched
from ...data.packing import PackedBatch
from ...data.rows import load_rows
from ...distill.losses import LossConfig
from ...distill.passes import compare, forward_model, means, total
from ...distill.teacher import Teacher
from ...durable_file import write_result
from ...errors import UserError
from ...fit.paired_fit import Sensitivity, WatchedPasses, moe_layers, silence_padding
from ...models.load import LoadedModel, load_model
from ...models.on_disk import adapted_steps
from ...moe import stats
from ...moe.replay import enable_replay, set_targets
from ...moe.router_dials import calibrate_threshold, zero_mask
from ...runtime import process_groups
from ...runtime.terminal import progress_bar, told
from ...text_table import text_table

CALIBRATION_PASSES = 4
ORACLES = ("oracle", "oracle, greedy in a layer", "oracle, greedy in a token")


@dataclass(frozen=True)
class OracleOptions(Watched):
    """What to compare."""

    students: list[str] | None = None
    """Checkpoints that `zeda fit` wrote, with zero experts that give nothing. The first is what others are compared
    with."""

    teacher: str | None = None
    """Megatron checkpoint of the static model."""

    data_path: str | None = None
    """Rollout file. Its last rows are taken; fits take the first."""

    rows: Count = 4
    """Packed rows."""

    seq_length: Count = 2048
    """Tokens of a packed row."""

    target_share: Share = 0.5
    """Share of the picks that every decision skips."""

    samples: Count = 12
    """Answers sampled at every position."""

    effect_floor: Amount = 1.0
    """f, as in `zeda fit`."""

    out: str | None = None
    """JSON file for the result."""


@dataclass(frozen=True)
class RowPicks:
    """The picks of a row of T tokens in every MoE layer, and what they do; padding has none."""

    ids_TLK: torch.Tensor
    """int64: expert of each pick."""
    weight_TLK: torch.Tensor
    """float32: its routing weight; 0 for padding."""
    z_TLKM: torch.Tensor
    """float32: gradient of minus the log-probability of M sampled answers along each pick's weighted output."""
    size_TLK: torch.Tensor
    """float32: |w E(x)|."""


class _EffectsInOrder:
    """Takes what `watch_effects` tells a `Sensitivity`: effects and sizes of a layer's rows, by expert, then token."""

    def __init__(self):
        self.effects: list[torch.Tensor] = []
        self.size = torch.empty(0)

    def add(self, effect_R: torch.Tensor, size_R: torch.Tensor) -> None:
        self.effects.append(effect_R)
        self.size = size_R


@contextmanager
def _probabilities(layers: dict) -> Iterator[dict[int, torch.Tensor]]:
    """Layer -> routing weights [T, N] of its last pass; 0 where nothing was picked, and for padding."""
    found = {}

    def keeper(number):
        def keep(router, args, kwargs, output):
            probs_TN, map_TN = silence_padding(router, args, kwargs, output)
            found[number] = (probs_TN * map_TN).detach().float()

        return keep

    with ExitStack() as stack:
        for number, layer in layers.items():
            handle = layer.router.register_forward_hook(keeper(number), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def look_at_picks(
    model: LoadedModel,
    row: PackedBatch,
    samples: int,
    seed: int,
    on_answer: Callable[[], Any] = lambda: None,
) -> RowPicks:
    """Run the static model on a row, sample answers, and go backward from each, `on_answer` called before."""
    chunk, topk = model.chunk, model.chunk.config.moe_router_topk
    layers = moe_layers(chunk)
    with zero_mask(chunk), _probabilities(layers) as probs, torch.no_grad():
        hidden = forward_model(chunk, row)
    answers = [
        replace(row, labels=labels) for labels in sampled_labels(chunk, hidden, row, model, samples, seed)
    ]
    found = {number: _EffectsInOrder() for number in layers}
    nowhere, none = dict.fromkeys(layers, lambda *rows: None), dict.fromkeys(layers, 0.0)
    passes = WatchedPasses(chunk, layers, model.arch.vocab_size, effect=True, on_row=on_answer)
    passes.run(answers, nowhere, none, found)
    by_layer = [_in_place(probs[number], found[number], topk) for number in sorted(layers)]
    return RowPicks(*(torch.stack(parts, 1) for parts in zip(*by_layer)))


def _in_place(probs_TN: torch.Tensor, found: _EffectsInOrder, topk: int) -> tuple[torch.Tensor, ...]:
    """One layer's picks by token: ids, weights, effects and sizes, [T, K] and [T, K, M]."""
    weight_TK, ids_TK = probs_TN.topk(topk)
    expert_R, token_R = probs_TN.t().nonzero(as_tuple=True)
    place_TN = torch.full(probs_TN.shape, len(expert_R), device=probs_TN.device)
    place_TN[token_R, expert_R] = torch.arange(len(expert_R), device=probs_TN.device)
    place_TK = place_TN.gather(1, ids_TK)
    effects_RM = torch.stack(found.effects, 1)
    z_TKM = torch.cat([effects_RM, effects_RM.new_zeros(1, effects_RM.shape[1])])[place_TK]
    size_TK = torch.cat([found.size, found.size.new_zeros(1)])[place_TK]
    return ids_TK, weight_TK, z_TKM, size_TK


def sampled_labels(chunk, hidden_SBH, row: PackedBatch, model: LoadedModel, samples: int, seed: int):
    """`samples` times the labels [1, S], answers drawn anew from the model's own distribution at every position."""
    head, where = chunk.head_weight()[: model.arch.vocab_size], row.loss_mask[0].nonzero()[:, 0]
    draw = torch.Generator().manual_seed(seed)
    drawn = []
    for part in hidden_SBH[:, 0][where.to(hidden_SBH.device)].split(256):
        shares = (part.to(head.dtype) @ head.t()).float().softmax(1)
        drawn.append(torch.multinomial(shares.cpu(), samples, replacement=True, generator=draw))
    for one in torch.cat(drawn).unbind(1):
        labels = row.labels.clone()
        labels[0, where] = one
        yield labels


def oracle_scores(rows: list[RowPicks], effect_floor: float) -> dict[str, list[torch.Tensor]]:
    """What each oracle says of the picks of every row, [T, L, K] float64: the least is skipped first."""
    layers = rows[0].ids_TLK.shape[1]
    floors = []
    for layer in range(layers):
        seen = Sensitivity()
        for row in rows:
            real_TK = row.weight_TLK[:, layer] > 0
            for z_TK in row.z_TLKM[:, layer].unbind(-1):
                seen.add(z_TK[real_TK], row.size_TLK[:, layer][real_TK])
        floors.append(effect_floor * seen.ratio())
    alone, in_layer, in_token = [], [], []
    for row in rows:
        extra_TLK = (row.size_TLK.double() * torch.tensor(floors)[None, :, None].to(row.size_TLK)).square()
        z_TLKM = row.z_TLKM.double()
        alone.append(z_TLKM.square().mean(-1) + extra_TLK)
        in_layer.append(greedy_increments(z_TLKM.flatten(0, 1), extra_TLK.flatten(0, 1)).view_as(extra_TLK))
        in_token.append(greedy_increments(z_TLKM.flatten(1, 2), extra_TLK.flatten(1)).view_as(extra_TLK))
    return dict(zip(ORACLES, (alone, in_layer, in_token)))


def greedy_increments(z_TPM: torch.Tensor, extra_TP: torch.Tensor) -> torch.Tensor:
    """What each of P picks adds when the picks of a row are taken one after the other, the least first; [T, P].

    Taken together, picks do mean((sum of z)^2) + sum of extra. A pick counts at least as much as those before it, so
    that a threshold cuts every order at one place.
    """
    together_TM = torch.zeros_like(z_TPM[:, 0])
    increments_TP, before_T = torch.full_like(extra_TP, torch.inf), extra_TP.new_zeros(len(extra_TP))
    left_TP = torch.ones_like(extra_TP, dtype=torch.bool)
    every = torch.arange(len(extra_TP), device=extra_TP.device)
    for _ in range(extra_TP.shape[1]):
        more_TP = (z_TPM.square() + 2 * z_TPM * together_TM[:, None]).mean(-1) + extra_TP
        least_T, pick_T = more_TP.masked_fill(~left_TP, torch.inf).min(1)
        before_T = torch.maximum(before_T, least_T)
        increments_TP[every, pick_T] = before_T
        left_TP[every, pick_T] = False
        together_TM = together_TM + z_TPM[every, pick_T]
    return increments_TP


class Comparison:
    """Students and oracles on some rows."""

    def __init__(self, options: OracleOptions):
        self.options = options
        for folder in options.students:
            if adapted_steps(folder, "--students"):
                raise UserError(
                    f"--students {folder}: was trained; an oracle judges decisions alone, so give what `zeda fit` wrote"
                )
        self.model = load_model(options.teacher)
        self.teacher = Teacher([self.model.chunk], "own")
        self.rows = load_rows(
            options.data_path, self.model.tokenizer, options.seq_length, options.rows, last=True
        )

    def run(self) -> dict:
        """`decisions`: name -> KL to the teacher and share skipped; `closed`: how much of the way from the first
        student to the best oracle the others go."""
        options = self.options
        of_row = len(options.students) * (CALIBRATION_PASSES + 1) + options.samples + 1 + len(ORACLES)
        with progress_bar(of_row * len(self.rows), "pass", "oracle", options.progress) as bar:
            return self._run(bar.update)

    def _run(self, on_pass: Callable[[], Any]) -> dict:
        decisions, first = {}, None

        def forward(chunk, row):
            on_pass()
            return forward_model(chunk, row)

        for folder in self.options.students:
            student = self._student(folder)
            first = first or student
            share = self.options.target_share
            calibrate_threshold(student.chunk, self.rows, share, forward, CALIBRATION_PASSES)
            decisions[folder] = self._distance(student, lambda index: None, on_pass)
        looked = [
            look_at_picks(first, row, self.options.samples, seed, on_pass)
            for seed, row in enumerate(self.rows)
        ]
        enable_replay([first.chunk])
        weights = [row.weight_TLK.double() for row in looked]
        for name, scores in {
            "routing weight": weights,
            **oracle_scores(looked, self.options.effect_floor),
        }.items():
            decisions[name] = self._distance(first, self._targets(looked, scores, first), on_pass)
        begin = decisions[self.options.students[0]]["kl"]
        way = begin - min(decisions[name]["kl"] for name in ORACLES)
        closed = {name: (begin - decisions[name]["kl"]) / way for name in self.options.students[1:]}
        return {"decisions": decisions, "closed": closed, "rows": len(self.rows)}

    def _student(self, folder: str) -> LoadedModel:
        student = load_model(folder)
        layers = moe_layers(student.chunk)
        if not layers or any(layer.router.zero.zero_experts_type != "zero" for layer in layers.values()):
            raise UserError(f"--students {folder}: has no paired zero experts that give nothing")
        return student

    def _targets(self, looked: list[RowPicks], scores: list[torch.Tensor], student: LoadedModel) -> Callable:
        """Row -> picks [T, layers, K] that skip the wanted share, of all rows together, with the least scores."""
        known = torch.cat([score[row.weight_TLK > 0] for row, score in zip(looked, scores, strict=True)])
        wanted = round(self.options.target_share * known.numel())
        least = known.sort().values[wanted - 1] if wanted else -torch.inf
        config, numbers = student.chunk.config, sorted(moe_layers(student.chunk))

        def targets(index: int) -> torch.Tensor:
            row, score_TLK = looked[index], scores[index]
            skipped_TLK = (score_TLK <= least) & (row.weight_TLK > 0)
            picks = torch.full((len(score_TLK), config.num_layers, config.moe_router_topk), -1)
            picks[:, [number - 1 for number in numbers]] = (
                row.ids_TLK + config.num_moe_experts * skipped_TLK
            ).cpu()
            # Padding is left to the router.
            picks[row.weight_TLK[:, 0, 0].cpu() == 0] = -1
            return picks

        return targets

    @torch.no_grad()
    def _distance(
        self, student: LoadedModel, targets: Callable, on_pass: Callable[[], Any] = lambda: None
    ) -> dict[str, float]:
        chunk, options, sums = student.chunk, self.options, total([])
        with stats.evaluating(chunk):
            for index, row in enumerate(self.rows):
                picks = targets(index)
                if picks is not None:
                    set_targets([chunk], picks)
                loss = LossConfig("forward_kl")
                found = compare(
                    [chunk], self.teacher, [row], options.seq_length, loss, student.arch.vocab_size
                )
                sums = sums + total([one.sums for one in found])
                on_pass()
            report = stats.collect(chunk, chunk.config.num_layers, process_groups.device())
        return {"kl": means(sums)["kl"], "zero_share": report.zero_share}


def format_comparison(result: dict) -> str:
    """A line a decision, the worst first, then what was closed."""
    rows = [["decided by", "KL to the teacher", "skipped"]]
    for name, found in sorted(result["decisions"].items(), key=lambda pair: -pair[1]["kl"]):
        rows.append([name, f"{found['kl']:.4f}", f"{found['zero_share']:.1%}"])
    first = next(iter(result["decisions"]))
    lines = [
        f"{name} goes {share:.0%} of the way from {first} to the oracle"
        for name, share in result["closed"].items()
    ]
    return "\n".join([*text_table(rows), *lines])


def main(argv: list[str]) -> int:
    """Entry point. Prints a table and writes the numbers to --out."""
    options = parse(argv, {"oracle": OracleOptions}, prog="zeda evaluate oracle")["oracle"]
    require(options, "students", "teacher", "data_path")
    with process_groups.started():
        result = Comparison(options).run()
    if options.out:
        write_result("--out", options.out, json.dumps(result, indent=2) + "\n")
    print(format_comparison(result))
    if options.out:
        told(f"wrote {options.out}")
    return 0
