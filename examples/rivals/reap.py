"""REAP: cut the experts whose output, weighted by the router, is least. A rival that needs no training.

python -m examples.rivals.reap --hf DIR --calibration FILE --fraction 0.5 --out DIR

Source: arXiv 2510.13999. The score of expert j of a layer is the mean, over the tokens routed to it, of
gate_j(x) * ||f_j(x)||; in every layer the experts of lowest score go, with their router rows. Top-k stays, so the model
has fewer weights and the same FLOPs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from zeda_megatron.config.arguments import parse, require
from zeda_megatron.convert.file_writer import FileWriter
from zeda_megatron.convert.hf_files import HFReader
from zeda_megatron.convert.import_checks import check_not_quantised
from zeda_megatron.convert.safetensors_shards import Planned, Shard, plan_shards, write_index
from zeda_megatron.errors import UserError
from zeda_megatron.models.hf_config import copy_side_files, write_config
from zeda_megatron.runtime.whole_folder import check_target, files_of, staged_folder
from zeda_megatron.runtime.worker import run_worker

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"\.gate\.(weight|e_score_correction_bias)$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class PruneOptions:
    """What to cut."""

    hf: str | None = None
    """Hugging Face folder of a static model."""

    calibration: str | None = None
    """Rollout file whose conversations are routed (never the held-out one)."""

    conversations: int = 200
    """How many of them."""

    fraction: float = 0.5
    """Share of each layer's experts to cut."""

    out: str | None = None
    """New folder."""


@torch.no_grad()
def expert_scores(model, conversations: Iterable[list[int]]) -> dict[int, torch.Tensor]:
    """Score of every expert, by layer number: [N] float64; 0 for an expert that no token is routed to.

    Args:
        model: a transformers model whose MoE layers call `experts(hidden_TH, ids_TK, weights_TK)`.
        conversations: token ids; every token counts, once per pick.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}

    def hook(layer: int):
        def count(experts, inputs):
            norms_S, ids_S = _weighted_norms(experts, *inputs)
            sums[layer].index_add_(0, ids_S, norms_S.double())
            counts[layer].index_add_(0, ids_S, torch.ones_like(norms_S, dtype=torch.double))

        return count

    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".experts") and hasattr(module, "gate_up_proj"):
            layer, size = int(name.split(".layers.")[1].split(".")[0]), module.gate_up_proj.shape[0]
            sums[layer] = torch.zeros(size, dtype=torch.double, device=module.gate_up_proj.device)
            counts[layer] = torch.zeros_like(sums[layer])
            hooks.append(module.register_forward_pre_hook(hook(layer)))
    try:
        for ids in conversations:
            model(torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for one in hooks:
            one.remove()
    return {layer: (sums[layer] / counts[layer].clamp(min=1)).cpu() for layer in sorted(sums)}


def _weighted_norms(experts, hidden_TH, ids_TK, weights_TK) -> tuple[torch.Tensor, torch.Tensor]:
    """gate * ||expert output|| of every pick [S = T*K] and the expert it went to."""
    ids_S, weights_S = ids_TK.reshape(-1), weights_TK.reshape(-1).float()
    token_S = torch.arange(ids_S.numel(), device=ids_S.device) // ids_TK.shape[1]
    norms_S = torch.zeros_like(weights_S)
    for expert in ids_S.unique().tolist():
        here = ids_S == expert
        rows_RH = hidden_TH.reshape(-1, hidden_TH.shape[-1])[token_S[here]]
        gate_RF, up_RF = F.linear(rows_RH, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        output_RH = F.linear(experts.act_fn(gate_RF) * up_RF, experts.down_proj[expert])
        norms_S[here] = weights_S[here] * output_RH.float().norm(dim=-1)
    return norms_S, ids_S


def kept_experts(scores: dict[int, torch.Tensor], fraction: float, topk: int) -> dict[int, list[int]]:
    """Experts that stay, by layer, in their old order. Raises `UserError` if fewer than `topk` would."""
    if not 0.0 < fraction < 1.0:
        raise UserError(f"--fraction {fraction} must lie between 0 and 1")
    kept = {}
    for layer, scores_N in scores.items():
        stay = scores_N.numel() - round(fraction * scores_N.numel())
        if stay < topk:
            raise UserError(f"--fraction {fraction} leaves {stay} experts, but the router picks {topk}")
        kept[layer] = sorted(scores_N.argsort(descending=True, stable=True)[:stay].tolist())
    return kept


def prune(options: PruneOptions) -> dict[int, list[int]]:
    """Score, cut and write; returns the experts that stay, by layer.

    Raises `UserError` for missing flags, a model with zero experts or groups of experts, or a folder in use.
    """
    require(options, "hf", "calibration", "out")
    from transformers import AutoModelForCausalLM

    from zeda_megatron.data.conversation import tokenize_rollout
    from zeda_megatron.data.prompts import load_rollouts
    from zeda_megatron.data.tokenizers import load_tokenizer
    from zeda_megatron.models.architecture import read_architecture

    arch = read_architecture(options.hf)
    if arch.num_zero_experts:
        raise UserError(f"--hf {options.hf}: has zero experts; prune the static model")
    tokenizer = load_tokenizer(options.hf)
    model = AutoModelForCausalLM.from_pretrained(options.hf, local_files_only=True, dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = []
    for rollout in load_rollouts(options.calibration):
        if len(tokens) == options.conversations:
            break
        tokens.append(tokenize_rollout(rollout, tokenizer).tokens)
    kept = kept_experts(expert_scores(model, tokens), options.fraction, arch.megatron["moe_router_topk"])
    write_pruned(options.hf, kept, options.out)
    return kept


def write_pruned(hf: str | Path, kept: dict[int, list[int]], out: str | Path) -> None:
    """Write `hf` with the experts in `kept` only (by layer, in their old order), renumbered from 0.

    Layers beyond those of the model (multi-token prediction) are left out: nothing is known of their experts.

    Raises:
        UserError: the folder is damaged, `out` is in use, layers keep different numbers of experts, or the router
            picks groups first.
    """
    check_target(Path(out), False)
    reader, counts = HFReader(hf), {len(experts) for experts in kept.values()}
    check_not_quantised(reader)
    if len(counts) != 1:
        raise UserError(f"{hf}: layers would keep {sorted(counts)} experts; a config has one number")
    if (reader.config.get("n_group") or 1) > 1:
        raise UserError(f"{hf}: its router picks groups of experts first; pruning would unbalance them")
    planned = list(_planned(reader, kept))

    def made(shard: Shard) -> Iterator[torch.Tensor]:
        for one in shard.tensors:
            key, rows = one.source
            tensor = reader.read(key)
            yield tensor if rows is None else tensor[rows].contiguous()

    shards = plan_shards(planned)
    config = dict(reader.config)
    config |= {name: counts.copy().pop() for name in _COUNTS if name in config}
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    request = {
        "make": "pruned",
        "source": files_of(reader.files),
        "kept": {str(k): v for k, v in kept.items()},
    }
    with staged_folder(out, request, False, False) as staging:
        if staging is not None:
            FileWriter(staging, shards, 1, "prune").run(
                lambda shard, stream: shard.write(stream, made(shard))
            )
            write_index(staging.work, shards)
            copy_side_files(Path(hf), staging.work)
            write_config(staging.work, config)


def _planned(reader: HFReader, kept: dict[int, list[int]]) -> Iterator[Planned]:
    layers = reader.config["num_hidden_layers"]
    for key in sorted(reader.keys()):
        entry, named = reader.entry(key), _LAYER.search(key)
        layer = int(named[1]) if named else None
        if layer is not None and layer >= layers:
            continue
        stay, expert = kept.get(layer), _EXPERT.search(key)
        if stay is not None and expert is not None:
            if int(expert[1]) in stay:
                new = key.replace(expert[0], f".experts.{stay.index(int(expert[1]))}.")
                yield Planned(new, entry.dtype, entry.shape, (key, None))
        elif stay is not None and _ROUTER.search(key):
            yield Planned(key, entry.dtype, (len(stay), *entry.shape[1:]), (key, stay))
        else:
            yield Planned(key, entry.dtype, entry.shape, (key, None))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    options = parse(sys.argv[1:] if argv is None else argv, {"reap": PruneOptions}, prog="reap")["reap"]
    kept = prune(options)
    print(f"{options.out}: {len(next(iter(kept.values())))} experts in each of {len(kept)} layers")
    return 0


if __name__ == "__main__":
    run_worker(main)
