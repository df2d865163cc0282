"""Which tokens skip: tables over the scored tokens of the held-out text, and rank correlations.

A token is scored if the next one belongs to a response. `skipped` is the share of its K * layers picks that went to a
zero expert or were dropped by a rule. A block in report.json, with BUCKET = {"tokens": count, "skipped": mean or None}:

* `all`: BUCKET of all scored tokens; `by_kind`: {kind of text: BUCKET}
* `by_position`: {"0-3": BUCKET, ...}, index of the next token in its response
* `by_entropy`: {"q1": BUCKET with "from" and "to", ...}, fifths of the teacher's next-token entropy in nats: above
  `from`, up to and including `to`
* `by_class`: {"digits": BUCKET, ...}, the token's own text (see `scored_tokens.py`)
* `correlations`: {VARIABLE: {"all": r, "by_kind": {kind: r}}}, Spearman's r of `skipped` with `teacher_entropy`,
  `log_prob_gap` (|log p_teacher - log p_student| of the next token, nats) and `position`; r is None where either is
  constant, and `correlations` itself is None where every token skips the same

These are correlations of a text as it is: neighbouring tokens are not independent, and none of it says why.
"""

from __future__ import annotations

import torch

from ...errors import library
from .scored_tokens import CLASSES, ScoredTokens

stats = library("scipy.stats")
POSITIONS = {"0-3": 0, "4-15": 4, "16-63": 16, "64+": 64}
"""Buckets of positions in a response, by their first one."""
FIFTHS = ("q1", "q2", "q3", "q4", "q5")
"""From the lowest to the highest entropy."""
VARIABLES = {"teacher_entropy": "entropy_T", "log_prob_gap": "gap_T", "position": "position_T"}
"""What `skipped` is correlated with: name in the report, field of `ScoredTokens`."""


def token_skips(by_kind: dict[str, ScoredTokens]) -> dict | None:
    """The block described above, of one measured arm; None if no token is scored."""
    tokens = ScoredTokens.join(list(by_kind.values())) if by_kind else None
    if not tokens:
        return None
    skipped_T = tokens.skipped_T
    starts = torch.tensor(list(POSITIONS.values()))
    bucket_T = torch.bucketize(tokens.position_T, starts, right=True) - 1
    return {
        "all": _bucket(skipped_T),
        "by_kind": {kind: _bucket(some.skipped_T) for kind, some in by_kind.items()},
        "by_position": _table(skipped_T, bucket_T, tuple(POSITIONS)),
        "by_entropy": _by_entropy(skipped_T, tokens.entropy_T),
        "by_class": _table(skipped_T, tokens.class_T, CLASSES),
        "correlations": _correlations(tokens, by_kind),
    }


def _bucket(skipped_T: torch.Tensor) -> dict:
    count = skipped_T.numel()
    return {"tokens": count, "skipped": float(skipped_T.mean()) if count else None}


def _table(skipped_T: torch.Tensor, bucket_T: torch.Tensor, names: tuple[str, ...]) -> dict:
    return {name: _bucket(skipped_T[bucket_T == i]) for i, name in enumerate(names)}


def _by_entropy(skipped_T: torch.Tensor, entropy_T: torch.Tensor) -> dict:
    """Fifths by value: tokens of one entropy are never parted, so with ties the fifths differ in size."""
    ordered_T = entropy_T.sort().values
    count = len(FIFTHS)
    # An edge is the last value of its fifth: what ties are likely, those near 0, stay in the lowest.
    edges = ordered_T[(torch.arange(1, count) * ordered_T.numel() // count - 1).clamp(min=0)]
    table = _table(skipped_T, torch.bucketize(entropy_T, edges), FIFTHS)
    bounds = [float(ordered_T[0]), *edges.tolist(), float(ordered_T[-1])]
    return {
        name: {**table[name], "from": low, "to": high}
        for name, low, high in zip(FIFTHS, bounds[:-1], bounds[1:])
    }


def _correlations(tokens: ScoredTokens, by_kind: dict[str, ScoredTokens]) -> dict | None:
    if bool((tokens.skipped_T == tokens.skipped_T[0]).all()):
        return None

    def with_skipped(some: ScoredTokens, field: str) -> float | None:
        return spearman(some.skipped_T, getattr(some, field))

    return {
        name: {
            "all": with_skipped(tokens, field),
            "by_kind": {kind: with_skipped(some, field) for kind, some in by_kind.items()},
        }
        for name, field in VARIABLES.items()
    }


def spearman(x_T: torch.Tensor, y_T: torch.Tensor) -> float | None:
    """Rank correlation of two [T] tensors, from -1 to 1; None if one of them is constant (or empty).

    Raises:
        ValueError: shapes differ, or a value is no number.
    """
    if x_T.shape != y_T.shape or x_T.dim() != 1:
        raise ValueError(f"rank correlation needs two vectors of one length, got {x_T.shape} and {y_T.shape}")
    if x_T.isnan().any() or y_T.isnan().any():
        raise ValueError("rank correlation of values that are not a number")
    if x_T.numel() == 0 or bool((x_T == x_T[0]).all()) or bool((y_T == y_T[0]).all()):
        return None
    return float(stats.spearmanr(x_T.cpu().numpy(), y_T.cpu().numpy()).statistic)
