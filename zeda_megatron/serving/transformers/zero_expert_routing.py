"""Routing over real and zero experts, for any transformers MoE model; travels with checkpoints, needs torch alone.

Shared routing: the router's usual top-k runs over N real and Nz zero experts, then slots that chose a zero expert are
dropped. Paired routing: each of the N experts has a zero expert of its own, which takes the picks whose score (log of
the predicted relative contribution) is below a threshold. Either way the weight of a dropped slot is not given to the
others, and its expert is not computed; a stand-in may answer in its place, for a small part of the work.

config.json: `zce_nums` [Nz], `zce_types` ["zero" | "copy" | "learned"] (paired: ["zero" | "constant" | "low_rank"]),
`use_zce_mask` (True: route over the N real experts only, which is the static model), `zce_routing` "shared" (default)
or "paired".
Compute dial of shared routing: `zce_logit_bias` (default 0), added to the logits of the zero experts.
Paired routing: `zce_score` names the score's terms, `zce_threshold` (a number, or one per MoE layer) is the dial,
`zce_head_width` the hidden units of the score's head (0: linear), `zce_rank` the rank of `low_rank` stand-ins.
`zce_batch_margin` (default 0): so near the threshold a pick follows its batch, see `kept_picks`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

KINDS = ("zero", "copy", "learned")
PAIRED_KINDS = ("zero", "constant", "low_rank")
ROUTINGS = ("shared", "paired")
TERMS = ("weight", "head", "residual")


class ZeroExperts(NamedTuple):
    """Zero experts of every MoE layer."""

    count: int
    """Nz."""
    kind: str
    """One of `KINDS`, under paired routing of `PAIRED_KINDS`."""
    terms: tuple[str, ...] | None = None
    """Terms of a pick's score under paired routing; None: shared routing."""
    head_width: int = 0
    """Hidden units of the head."""
    rank: int = 0
    """Of `low_rank`."""

    @property
    def rows(self) -> int:
        """Rows of the router's weight behind those of the real experts."""
        return self.count if self.terms is None else 0

    @property
    def unread_rows(self) -> int:
        """Rows of the router's weight behind all those, of zeros, which nothing reads.

        Paired routing has one. `model_type` is a native one, so that a loader that does not know this routing takes the
        stock class: it fails on the shape, where it would have opened the folder as the static model.
        """
        return 0 if self.terms is None else 1


def zero_experts(config, num_real: int) -> ZeroExperts:
    """Zero experts that a config asks for; `ValueError` where that makes no sense."""
    counts = getattr(config, "zce_nums", None)
    kinds = getattr(config, "zce_types", None) or ["zero"]
    if not counts:
        raise ValueError("config.json has no zce_nums: a model with zero experts needs e.g. [64]")
    routing = getattr(config, "zce_routing", None) or "shared"
    if routing not in ROUTINGS:
        raise ValueError(f"zce_routing {routing!r} is unknown; known: {', '.join(ROUTINGS)}")
    known = KINDS if routing == "shared" else PAIRED_KINDS
    if len(counts) != len(kinds) or len(set(kinds)) != 1 or kinds[0] not in known:
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} is not supported; one kind of {known} per model"
        )
    if routing == "shared":
        return ZeroExperts(sum(counts), kinds[0])
    if list(counts) != [num_real]:
        raise ValueError(
            f"zce_nums {counts} does not fit paired routing, which has one zero expert per real one: [{num_real}]"
        )
    score = getattr(config, "zce_score", None) or "+".join(TERMS)
    terms = tuple(score.split("+"))
    if not set(terms) <= set(TERMS) or len(set(terms)) < len(terms):
        raise ValueError(f"zce_score {score!r} is unknown; join some of {', '.join(TERMS)} with '+'")
    width, rank = (getattr(config, key, None) or 0 for key in ("zce_head_width", "zce_rank"))
    if (rank > 0) != (kinds[0] == "low_rank"):
        raise ValueError(f"zce_rank {rank} does not fit zce_types {kinds}: low_rank alone has a rank")
    return ZeroExperts(num_real, kinds[0], terms, width, rank)


def number(key: str, value) -> float:
    """A finite float32 as a Python float; `ValueError` naming the key."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} {value!r} is not a number")
    rounded = torch.tensor(float(value), dtype=torch.float32, device="cpu").item()
    if not math.isfinite(rounded):
        raise ValueError(f"{key} {value!r} is not a finite number")
    return rounded


@dataclass
class ZeroDials:
    """What may be turned while a model serves; router and block of a layer share one."""

    masked: bool = False
    """Route over the real experts; zero rows are not even multiplied."""
    logit_bias: float = 0.0
    """Added to the logits of shared zero experts."""
    threshold: float = 0.0
    """Of paired ones: a pick with a lower score is skipped. A Python number that is a float32 exactly (a buffer would
    be rounded with the model's type)."""
    batch_margin: float = 0.0
    """Of paired ones: so near the threshold a pick follows its batch (`kept_picks`)."""
    more_B: torch.Tensor | None = None
    """Added to the dial for the tokens of each sequence of a batch, float32 [B]; None: nothing."""

    def of_tokens(self, dial: float, hidden_TH: torch.Tensor):
        """The dial for the tokens of a batch, sequence after sequence: a number, or float32 [T, 1]."""
        if self.more_B is None:
            return dial
        sequences, tokens = len(self.more_B), len(hidden_TH)
        if tokens % sequences:
            raise ValueError(
                f"zero dials were set for {sequences} sequences, these are {tokens} tokens of others"
            )
        more_B = self.more_B.to(hidden_TH.device)  # layers may lie on several
        return (dial + more_B).repeat_interleave(tokens // sequences).unsqueeze(1)


class ZeroExpertRouting:
    """Goes before a stock router among the bases of a class, which adds `_pick` (and `_project` where it is no plain
    product) and calls `add_zero_experts` at the end of its constructor. `SoftmaxPicks` and `SigmoidPicks` are two such.

    Attributes:
        num_real: N.
        dials: see `ZeroDials`.
    """

    ROUNDED = True
    """Weights of picks have the logits' type, as in most stock routers; else they are float32."""

    def add_zero_experts(self, config, num_real: int) -> None:
        self.num_real, self.zero = num_real, zero_experts(config, num_real)
        self.dials = ZeroDials(masked=bool(getattr(config, "use_zce_mask", False)))
        self._residual_norm_T = None
        old = self.weight
        rows = num_real + self.zero.rows + self.zero.unread_rows
        self.weight = nn.Parameter(torch.empty(rows, old.shape[1], dtype=old.dtype))
        if self.zero.kind == "learned":
            self.zero_bias = nn.Parameter(torch.zeros(self.zero.count, old.shape[1]))
        if self.zero.terms is not None:
            self.zero_weight = nn.Parameter(torch.zeros(num_real, old.shape[1]))
            self.zero_bias = nn.Parameter(torch.zeros(num_real))
            for name, shape in paired_shapes(self.zero, old.shape[1]).items():
                setattr(self, name, nn.Parameter(torch.zeros(*shape)))

    def forward(self, hidden_states, *more):
        """[..., H] -> logits [T, N+Nz] (masked or paired: [T, N]), weights [T, K], ids [T, K], answer [T, H] or None.

        Ids from N on are zero experts: which one it is under shared routing, always N under paired routing. The answer
        is what zero experts add to the layer's output, where they are not the plain ones that add nothing. `more` is
        for `_pick`.
        """
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = self.num_real + (0 if self.dials.masked else self.zero.rows)
        logits_TE = self._project(hidden_TH, self.weight[:rows])
        dtype = logits_TE.dtype
        turned = self.dials.logit_bias or self.dials.more_B is not None
        if turned and rows > self.num_real:
            real, zero = logits_TE.float().split([self.num_real, self.zero.rows], dim=-1)
            bias = self.dials.of_tokens(self.dials.logit_bias, hidden_TH)
            logits_TE = torch.cat([real, zero + bias], dim=-1)
        weights_TK, ids_TK = self._pick(logits_TE, *more)
        if self.zero.terms is not None and not self.dials.masked:
            threshold = self.dials.of_tokens(self.dials.threshold, hidden_TH)
            score_TK = self._scores(hidden_TH, weights_TK, ids_TK)
            kept_TK = kept_picks(score_TK, ids_TK, threshold, self.dials.batch_margin, self.num_real)
            weights_TK, answer_TH = self._rounded(weights_TK, dtype), None
            if self.zero.kind != "zero":
                parts = (getattr(self, name, None) for name in ("zero_down", "zero_up", "zero_constant"))
                answer_TH = stand_ins(hidden_TH, weights_TK, ids_TK, ~kept_TK, *parts)
            return logits_TE, weights_TK, torch.where(kept_TK, ids_TK, self.num_real), answer_TH
        weights_TK = self._rounded(weights_TK, dtype)
        return logits_TE, weights_TK, ids_TK, self._answer(hidden_TH, weights_TK, ids_TK)

    def _rounded(self, weights_TK, dtype):
        return weights_TK.to(dtype) if self.ROUNDED else weights_TK

    def _answer(self, hidden_TH, weights_TK, ids_TK):
        if self.zero.kind == "zero" or self.dials.masked:
            return None
        zero_TK = ids_TK >= self.num_real
        if self.zero.kind == "copy":
            return (weights_TK * zero_TK).sum(dim=-1, keepdim=True) * hidden_TH
        bias_TKH = self.zero_bias[(ids_TK - self.num_real).clamp(min=0)]
        return ((weights_TK * zero_TK).unsqueeze(-1) * bias_TKH).sum(dim=1)

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH, weight_EH)

    def _pick(self, logits_TE):
        """The model's own routing: [T, E] -> float32 weights [T, K] and ids [T, K]."""
        raise NotImplementedError

    def see_residual(self, _norm, args) -> None:
        """Forward pre-hook of the norm before the layer: remember |residual| of its input [B, S, H]."""
        if "residual" in self.zero.terms and not self.dials.masked:
            norm = torch.linalg.vector_norm(args[0].detach(), dim=-1, dtype=torch.float32)
            self._residual_norm_T = norm.reshape(-1)

    @torch.no_grad()
    def _scores(self, hidden_TH, weights_TK, ids_TK):
        """[weight] log of the pick's weight + [head] `predict` - [residual] log|residual|, in float32;
        x is the router's input, the residual is the stream that the layer's output is added to."""
        score_TK = torch.zeros_like(weights_TK)
        if "weight" in self.zero.terms:
            score_TK = score_TK + weights_TK.clamp(min=1e-20).log()
        if "head" in self.zero.terms:
            with torch.autocast(hidden_TH.device.type, enabled=False):
                head = predict(hidden_TH, self)
            score_TK = score_TK + head.gather(1, ids_TK)
        if "residual" in self.zero.terms:
            norm_T, self._residual_norm_T = self._residual_norm_T, None
            if norm_T is None:
                raise RuntimeError("the paired router saw no residual: run the whole decoder layer")
            score_TK = score_TK - norm_T.clamp(min=1e-20).log().unsqueeze(-1)
        return score_TK


class SoftmaxPicks(ZeroExpertRouting):
    """Softmax over all experts, the K best; they share 1 where `norm_topk_prob` says so."""

    def _pick(self, logits_TE):
        weights, ids = torch.topk(F.softmax(logits_TE, dtype=torch.float, dim=-1), self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids


class SigmoidPicks(ZeroExpertRouting):
    """Sigmoid scores in float32, the K best by score + bias, weights = score / sum of the K, times
    `routed_scaling_factor`; real experts from the best groups alone where there are several. Zero experts have biases.
    """

    def add_zero_experts(self, config, num_real: int) -> None:
        super().add_zero_experts(config, num_real)
        rows = num_real + self.zero.rows
        self.e_score_correction_bias = nn.Buffer(torch.zeros(rows, dtype=torch.float32))
        # Not all versions' stock routers have them.
        self.top_k, self.routed_scaling_factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH.float(), weight_EH.float())

    def _pick(self, logits_TE):
        scores = logits_TE.sigmoid()
        choice = scores + self.e_score_correction_bias[: scores.shape[1]]
        choice = limit_to_groups(choice, self.num_real, *self.groups, best=2)
        ids = torch.topk(choice, self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor, ids


def limit_to_groups(scores_TE, num_real, groups, kept, best):
    """Scores that choose, -inf for real experts outside the `kept` groups whose `best` best scores sum to most; columns
    from `num_real` on, zero experts, belong to no group."""
    if groups == kept:
        return scores_TE
    real_TGM = scores_TE[:, :num_real].unflatten(1, (groups, -1))
    chosen = real_TGM.topk(best, dim=-1)[0].sum(dim=-1).topk(kept, dim=-1, sorted=False)[1]
    outside_TG = torch.ones_like(real_TGM[..., 0], dtype=torch.bool).scatter(1, chosen, False)
    real_TN = real_TGM.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(1)
    return torch.cat([real_TN, scores_TE[:, num_real:]], dim=1)


MEMORY_BOUND_ROWS = 256
"""Up to so many tokens a pass waits for weights rather than for products (a few rows for each expert)."""


def kept_picks(score_TK, ids_TK, threshold, margin, num_real, no_token_T=None):
    """Which picks of paired routing are computed, bool [T, K]: those whose score reaches the threshold.

    A step of decoding many sequences waits for the weights of the experts that it reads, not for their products. With a
    margin a pick that is nearer than that to the threshold is computed exactly if a pick beyond it, of any token of the
    pass, has its expert read anyway. What a token is given then depends on the tokens that come with it.

    Args:
        threshold: a number, or [T, 1].
        margin: 0 or more; 0 is the plain rule, which passes of more than `MEMORY_BOUND_ROWS` tokens follow as well.
        no_token_T: bool, rows of the pass that are no tokens.
    """
    if not margin or len(ids_TK) > MEMORY_BOUND_ROWS:
        return score_TK >= threshold
    sure_TK = score_TK >= threshold + margin
    if no_token_T is not None:
        sure_TK = sure_TK & ~no_token_T.unsqueeze(1)
    read_N = torch.zeros(num_real + 1, dtype=torch.bool, device=ids_TK.device)
    read_N[ids_TK.masked_fill(~sure_TK, num_real)] = True
    return sure_TK | ((score_TK >= threshold - margin) & read_N[:num_real][ids_TK])


def batch_margin(value) -> float:
    """`zce_batch_margin` of a config, 0 where it is not there; `ValueError` if it makes no sense."""
    value = number("zce_batch_margin", value or 0.0)
    if value < 0:
        raise ValueError(f"zce_batch_margin {value} must be 0 or more")
    return value


def paired_shapes(zero: ZeroExperts, hidden: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a router with paired zero experts beside the linear head, by name."""
    shapes = {}
    if zero.head_width:
        shapes["zero_hidden_weight"] = (zero.head_width, hidden)
        shapes["zero_hidden_bias"] = (zero.head_width,)
        shapes["zero_hidden_output"] = (zero.count, zero.head_width)
    if zero.kind != "zero":
        shapes["zero_constant"] = (zero.count, hidden)
    if zero.rank:
        shapes["zero_down"] = (zero.count, zero.rank, hidden)
        shapes["zero_up"] = (zero.count, hidden, zero.rank)
    return shapes


def predict(hidden_TH, router):
    """What the head says of every expert, float32 [T, N]."""
    x_TH = hidden_TH.float()
    value_TN = F.linear(x_TH, router.zero_weight.float(), router.zero_bias.float())
    if not hasattr(router, "zero_hidden_weight"):
        return value_TN
    unit_TU = F.silu(F.linear(x_TH, router.zero_hidden_weight.float(), router.zero_hidden_bias.float()))
    return value_TN + F.linear(unit_TU, router.zero_hidden_output.float())


FEW_SLOTS = 64
"""Up to so many slots (a step of decoding) their own matrices are read; beyond, rows are sorted by expert."""


def stand_ins(x_TH, weights_TK, ids_TK, skipped_TK, down_NRH, up_NHR, constant_NH):
    """[T, H]: sum over skipped picks of w * (up.down.x + constant), of the pick's expert."""
    tokens, topk = ids_TK.shape
    weights_TK = (weights_TK * skipped_TK).to(x_TH.dtype)
    few = tokens * topk <= FEW_SLOTS
    if few:
        answer_TH = torch.bmm(weights_TK.unsqueeze(1), constant_NH[ids_TK]).squeeze(1)
    else:
        weights_TN = weights_TK.new_zeros(tokens, len(constant_NH)).scatter(1, ids_TK, weights_TK)
        answer_TH = weights_TN @ constant_NH
    if down_NRH is None:
        return answer_TH
    if x_TH.device.type == "cpu" and not torch.compiler.is_compiling():
        return _answer_by_expert(answer_TH, x_TH, weights_TK, ids_TK, skipped_TK, down_NRH, up_NHR)
    # From here on no shape depends on how many are skipped (CUDA graphs, torch.compile).
    if few:
        ids_S, x_SH1 = ids_TK.flatten(), x_TH.repeat_interleave(topk, 0).unsqueeze(2)
        answers_SH = torch.bmm(up_NHR[ids_S], torch.bmm(down_NRH[ids_S], x_SH1)).squeeze(2)
    else:
        answers_SH = _sorted_answers(x_TH, ids_TK, skipped_TK, down_NRH, up_NHR)
    return answer_TH + (answers_SH * weights_TK.reshape(-1, 1)).view(tokens, topk, -1).sum(1)


def _answer_by_expert(answer_TH, x_TH, weights_TK, ids_TK, skipped_TK, down_NRH, up_NHR):
    """Adds up.down.x of the skipped slots alone, one expert after the other; asks how many each has."""
    token_R, place_R = skipped_TK.nonzero(as_tuple=True)
    ids_R = ids_TK[token_R, place_R]
    order_R = ids_R.argsort(stable=True)
    token_R, place_R = token_R[order_R], place_R[order_R]
    counts = torch.bincount(ids_R, minlength=len(down_NRH)).tolist()
    parts = zip(x_TH[token_R].split(counts), down_NRH, up_NHR)
    rows = [F.linear(F.linear(x, down), up) for x, down, up in parts if len(x)]
    if not rows:
        return answer_TH
    rows_RH = torch.cat(rows) * weights_TK[token_R, place_R].unsqueeze(1)
    return answer_TH.index_add(0, token_R, rows_RH)


def _sorted_answers(x_TH, ids_TK, skipped_TK, down_NRH, up_NHR):
    """up.down.x of every skipped slot [T*K, H]; 0 elsewhere."""
    experts, topk = down_NRH.shape[0], ids_TK.shape[1]
    ids_S = ids_TK.masked_fill(~skipped_TK, experts).flatten()
    order_S = ids_S.argsort(stable=True)
    counts_E = torch.bincount(ids_S, minlength=experts + 1)
    if hasattr(F, "grouped_mm"):
        # The rows of its operands are whole 16 bytes.
        missing = -down_NRH.shape[1] % (16 // down_NRH.element_size())
        down_NRH, up_NHR = F.pad(down_NRH, (0, 0, 0, missing)), F.pad(up_NHR, (0, missing))
        # Rows behind the last group are not computed, forward nor backward.
        inside_S1 = (ids_S[order_S] < experts)[:, None]
        ends_N = counts_E[:experts].cumsum(0).to(torch.int32)
        rows_SH = torch.where(inside_S1, x_TH[order_S // topk], 0)
        low_SR = F.grouped_mm(rows_SH, down_NRH.transpose(1, 2), offs=ends_N)
        rows_SH = torch.where(inside_S1, F.grouped_mm(low_SR, up_NHR.transpose(1, 2), offs=ends_N), 0)
    else:
        counts = counts_E.tolist()
        parts = x_TH[order_S // topk].split(counts)
        rows = [F.linear(F.linear(x, a), b) for x, a, b in zip(parts, down_NRH, up_NHR)]
        rows_SH = torch.cat([*rows, x_TH.new_zeros(counts[-1], x_TH.shape[1])])
    return torch.zeros_like(rows_SH).index_copy(0, order_S, rows_SH)
