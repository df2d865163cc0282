"""Routing over real and zero experts, for any transformers MoE model; travels with checkpoints, needs torch alone.

Shared routing: the router's usual top-k runs over N real and Nz zero experts, then slots that chose a zero expert are
dropped. Paired routing: each of the N experts has a zero expert of its own, which takes the picks whose score (log of
the predicted relative contribution) is below a threshold. Either way the weight of a dropped slot is not given to the
others, and nothing is computed for it.

config.json: `zce_nums` [Nz], `zce_types` ["zero" | "copy" | "learned"], `use_zce_mask` (True: route over the N real
experts only, which is the static model), `zce_routing` "shared" (default) or "paired".
Compute dial of shared routing: `zce_logit_bias` (default 0), added to the logits of the zero experts.
Paired routing: `zce_score` names the score's terms, `zce_threshold` (a number, or one per MoE layer) is the dial.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

KINDS = ("zero", "copy", "learned")
ROUTINGS = ("shared", "paired")
TERMS = ("weight", "head", "residual")


class ZeroExperts(NamedTuple):
    """Zero experts of every MoE layer."""

    count: int
    """Nz."""
    kind: str
    """zero, copy or learned."""
    terms: tuple[str, ...] | None = None
    """Terms of a pick's score under paired routing; None: shared routing."""

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
    if len(counts) != len(kinds) or len(set(kinds)) != 1 or kinds[0] not in KINDS:
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} is not supported; one kind of {KINDS} per model"
        )
    routing = getattr(config, "zce_routing", None) or "shared"
    if routing not in ROUTINGS:
        raise ValueError(f"zce_routing {routing!r} is unknown; known: {', '.join(ROUTINGS)}")
    if routing == "shared":
        return ZeroExperts(sum(counts), kinds[0])
    if list(counts) != [num_real] or kinds[0] != "zero":
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} does not fit paired routing, which has one zero expert per "
            f"real one: [{num_real}] and ['zero']"
        )
    score = getattr(config, "zce_score", None) or "+".join(TERMS)
    terms = tuple(score.split("+"))
    if not set(terms) <= set(TERMS) or len(set(terms)) < len(terms):
        raise ValueError(f"zce_score {score!r} is unknown; join some of {', '.join(TERMS)} with '+'")
    return ZeroExperts(num_real, "zero", terms)


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


class ZeroExpertRouting:
    """Goes before a stock router among the bases of a class, which adds `_pick` (and `_project` where it is no plain
    product) and calls `add_zero_experts` at the end of its constructor.

    Attributes:
        num_real: N.
        dials: see `ZeroDials`.
    """

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

    def forward(self, hidden_states):
        """[..., H] -> logits [T, N+Nz] (masked or paired: [T, N]), weights [T, K], ids [T, K], answer [T, H] or None.

        Ids from N on are zero experts: which one it is under shared routing, always N under paired routing. The answer
        is what zero experts add to the layer's output, where they are not the plain ones that add nothing.
        """
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = self.num_real + (0 if self.dials.masked else self.zero.rows)
        logits_TE = self._project(hidden_TH, self.weight[:rows])
        dtype = logits_TE.dtype
        if self.dials.logit_bias and not self.dials.masked:
            real, zero = logits_TE.float().split([self.num_real, self.zero.rows], dim=-1)
            logits_TE = torch.cat([real, zero + self.dials.logit_bias], dim=-1)
        weights_TK, ids_TK = self._pick(logits_TE)
        if self.zero.terms is not None and not self.dials.masked:
            kept_TK = self._scores(hidden_TH, weights_TK, ids_TK) >= self.dials.threshold
            ids_TK = torch.where(kept_TK, ids_TK, self.num_real)
        weights_TK = weights_TK.to(dtype)
        return logits_TE, weights_TK, ids_TK, self._answer(hidden_TH, weights_TK, ids_TK)

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
        """[weight] log of the pick's weight + [head] zero_weight.x + zero_bias - [residual] log|residual|, in float32;
        x is the router's input, the residual is the stream that the layer's output is added to."""
        score_TK = torch.zeros_like(weights_TK)
        if "weight" in self.zero.terms:
            score_TK = score_TK + weights_TK.clamp(min=1e-20).log()
        if "head" in self.zero.terms:
            with torch.autocast(hidden_TH.device.type, enabled=False):
                head = F.linear(hidden_TH.float(), self.zero_weight.float(), self.zero_bias.float())
            score_TK = score_TK + head.gather(1, ids_TK)
        if "residual" in self.zero.terms:
            norm_T, self._residual_norm_T = self._residual_norm_T, None
            if norm_T is None:
                raise RuntimeError("the paired router saw no residual: run the whole decoder layer")
            score_TK = score_TK - norm_T.clamp(min=1e-20).log().unsqueeze(-1)
        return score_TK
