"""A whole MoE layer, densely: every expert on every token, the routing written out; on one rank or several."""

from __future__ import annotations

import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.pick_rules import DynamicSkipping, StaticTopK
from zeda_megatron.moe.router_dials import set_dials

N, K, H = tiny.TINY["num_experts"], tiny.TINY["num_experts_per_tok"], tiny.TINY["hidden_size"]
ROUTINGS = ("shared", "paired", "paired head", "topk", "skip")
"""Shared zero experts; paired ones; the same with a head that trains; two pick rules of the static model."""
SITUATIONS = ("plain", "last starves", "all starve", "idle")
"""`starves`: the tokens of a rank have no real slot at all. `idle`: the last rank's experts get no token."""
THRESHOLD = -1.0
RULES = {"topk": StaticTopK(1), "skip": DynamicSkipping(0.6)}
LOVE = torch.linspace(-1, 1, H)
"""What all tokens have in common in some situations, and some router rows ask for."""


def zero_config(routing: str) -> ZeroExpertConfig:
    if "paired" in routing:
        return ZeroExpertConfig(N, zero_expert_routing="paired", paired_score="weight+head")
    return ZeroExpertConfig(4 if routing == "shared" else 0)


def whole_weights(routing: str, situation: str) -> dict:
    """Weights of all ranks together."""
    weights = tiny.moe_layer_weights(zero_config("shared"))
    weights["router"] = weights["router"][: N + 4 if routing == "shared" else N]
    generator = torch.Generator().manual_seed(8)
    weights["U"], weights["c"] = (torch.randn(*s, generator=generator) * 0.2 for s in ((N, H), (N,)))
    if situation == "idle":
        weights["router"][:K] = 40 * LOVE
    elif situation != "plain" and routing == "shared":
        weights["router"][N : N + K] = 40 * LOVE
    return weights


def inputs_of(routing: str, situation: str, ranks: int) -> list[torch.Tensor]:
    made = [tiny.hidden_states(13, seed=1 + rank).detach() for rank in range(ranks)]
    for rank in range(ranks):
        starves = situation == "all starve" or (situation == "last starves" and rank == ranks - 1)
        if situation == "idle" or (starves and routing == "shared"):
            made[rank] = made[rank] * 0.1 + LOVE
    return made


def threshold_of(situation: str, rank: int, ranks: int) -> float:
    """Above all scores for ranks that starve: every pick goes to its zero expert."""
    starves = situation == "all starve" or (situation == "last starves" and rank == ranks - 1)
    return 1e4 if starves else THRESHOLD


def slice_of(pair, place: int, parts: int):
    """One expert's weights on one of several expert-tensor-parallel ranks."""
    fc1, fc2 = pair
    gate, up = (half.chunk(parts)[place] for half in fc1.chunk(2))
    return torch.cat([gate, up]), fc2.chunk(parts, 1)[place]


def fill(layer, weights: dict, routing: str, threshold: float, first: int, place: int = 0, parts: int = 1):
    """Give a rank's layer its weights; its experts begin with number `first`."""
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for e, pair in enumerate(tiny.expert_weights(layer)):
            for mine, whole in zip(pair, slice_of(weights["experts"][first + e], place, parts)):
                mine.copy_(whole)
        if "paired" in routing:
            paired = layer.router.paired
            paired.weight.copy_(weights["U"])
            paired.bias.copy_(weights["c"])
            paired.threshold.fill_(threshold)
            paired.requires_grad_(routing == "paired head")
    set_dials(layer, pick_rule=RULES.get(routing))


class DenseLayer:
    """The reference; `leaves` are its parameters by name."""

    def __init__(self, weights: dict, routing: str):
        self.routing = routing
        self.leaves = {k: weights[k].clone().requires_grad_() for k in ("router", "U", "c")}
        self.experts = [[fc.clone().requires_grad_() for fc in pair] for pair in weights["experts"]]

    def __call__(self, hidden: torch.Tensor, threshold: float):
        """(output, map of the rows that are dispatched, map of the picks that real experts keep)."""
        flat_TH = hidden.reshape(-1, H)
        routed = tiny.dense_routing(flat_TH @ self.leaves["router"].t(), K, N)
        weights_TN, map_TN = routed.real_TN, routed.map_TE[:, :N]
        dispatched_TN = kept_TN = map_TN
        if self.routing in RULES:
            heaviest_T1 = weights_TN.detach().max(1, keepdim=True).values
            limit_T1 = heaviest_T1 * {"topk": 1.0, "skip": 0.6}[self.routing]
            dispatched_TN = kept_TN = map_TN & (weights_TN.detach() >= limit_T1)
            weights_TN = weights_TN * kept_TN
        elif "paired" in self.routing:
            score_TN = weights_TN.detach().clamp(min=1e-20).log()
            score_TN = score_TN + flat_TH.detach() @ self.leaves["U"].t() + self.leaves["c"]
            kept_TN = map_TN & (score_TN.detach() >= threshold)
            hard_TN = kept_TN.float()
            if self.routing == "paired head":  # straight-through: all picks are computed, skipped ones at 0
                gate_TN = torch.sigmoid(score_TN - threshold)
                hard_TN = hard_TN + gate_TN - gate_TN.detach()
            else:
                dispatched_TN = kept_TN
            weights_TN = weights_TN * hard_TN
        output = tiny.dense_experts(flat_TH, weights_TN, self.experts)
        return output.view_as(hidden), dispatched_TN, kept_TN


def compare(layer, routing: str, situation: str, rank: int = 0, ranks: int = 1, sliced: bool = False) -> dict:
    """Run a rank's layer forward and backward beside the dense one over all ranks' tokens.

    Ranks share the experts among them, or, `sliced`, every rank has a slice of each.

    Returns:
        `worst`: `tiny.gap` of the output and all gradients; `rows`: [seen by my experts, what they should be].
    """
    weights, inputs = whole_weights(routing, situation), inputs_of(routing, situation, ranks)
    thresholds = [threshold_of(situation, r, ranks) for r in range(ranks)]
    per_rank = N // ranks
    local = slice(0, N) if sliced else slice(per_rank * rank, per_rank * (rank + 1))
    place, parts = (rank, ranks) if sliced else (0, 1)
    fill(layer, weights, routing, thresholds[rank], local.start, place, parts)
    seen = []
    handle = layer.experts.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape[0], args[1].tolist()))
    )
    layer.train()
    mine = inputs[rank].clone().requires_grad_()
    output, _ = layer(mine)
    handle.remove()
    draws = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(5 + r)) for r, x in enumerate(inputs)
    ]
    (output * draws[rank]).sum().backward()

    dense = DenseLayer(weights, routing)
    inputs = [x.clone().requires_grad_() for x in inputs]
    made = [dense(x, threshold) for x, threshold in zip(inputs, thresholds)]
    losses = [(out * draw).sum() for (out, _, _), draw in zip(made, draws)]
    named = {"router": layer.router.weight}
    if routing == "paired head":
        named |= {"U": layer.router.paired.weight, "c": layer.router.paired.bias}
    wanted = [inputs[rank], *(dense.leaves[name] for name in named)]
    grads = torch.autograd.grad(losses[rank], wanted, retain_graph=True, materialize_grads=True)
    worst = {"output": tiny.gap(output, made[rank][0]), "input": tiny.gap(mine.grad, grads[0])}
    for (name, parameter), grad in zip(named.items(), grads[1:]):
        worst[name] = tiny.gap(torch.zeros_like(grad) if parameter.grad is None else parameter.grad, grad)
    experts = dense.experts[local]
    grads = torch.autograd.grad(sum(losses), [w for pair in experts for w in pair], materialize_grads=True)
    worst["experts"] = 0.0
    for pair, *wanted in zip(tiny.expert_weights(layer), grads[::2], grads[1::2]):
        for parameter, grad in zip(pair, slice_of(wanted, place, parts)):
            assert parameter.grad is not None, "Megatron's DDP waits for every gradient"
            worst["experts"] = max(worst["experts"], tiny.gap(parameter.grad, grad))
    rows_N = sum(dispatched.sum(0) for _, dispatched, _ in made)[local]
    kept = [int(kept.sum()) for _, _, kept in made]
    return {
        "worst": worst,
        "rows": [seen[0][0], int(rows_N.sum())],
        "counts": [seen[0][1], rows_N.tolist()],
        "kept": kept,
    }
