"""One training step under the counter of `evaluation.traffic`: bytes and rows, summed over the ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from zeda_megatron.config.arguments import parse
from zeda_megatron.config.options import GROUPS, Options
from zeda_megatron.data.packing import PackedBatch
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.distill.teacher import Teacher
from zeda_megatron.moe import stats
from zeda_megatron.moe.pick_rules import StaticTopK
from zeda_megatron.moe.router_dials import calibrate_threshold, set_dials
from zeda_megatron.training.build import build_student
from zeda_megatron.training.optimizer import build_optimizer
from zeda_megatron.training.step import Stepper

from .traffic import Traffic


def measure(options, share: float, hf_config: str | None, **fields) -> dict:
    """Bytes of one step in this process group, added up over its ranks.

    Args:
        hf_config: HF folder of the geometry; None takes the checkpoint's.
        fields: further options of the run (`moe_token_dispatcher_type`, `paired_head_lr`).
    """
    model = {"stage": "pretrain", "moe_router_load_balancing_type": "none", "hf_config": hf_config}
    model |= {"pretrained_checkpoint": options.pretrained_checkpoint}
    model |= {"expert_model_parallel_size": options.expert_model_parallel_size}
    if options.routing == "paired":
        model |= {"zero_expert_routing": "paired"}
    run = Options(**parse(["--seq-length", str(options.seq_length)], GROUPS, model | fields))
    student = build_student(run)
    optimizer, _ = build_optimizer(run.optimizer, student, run.model.bf16, run.share.paired_head_lr)
    stepper = Stepper(student, None, optimizer, run.loss(), options.seq_length)
    rows = random_rows(options, student.arch.vocab_size)
    if options.routing == "topk":
        topk = student.arch.megatron["moe_router_topk"]
        set_dials(student.chunks, pick_rule=StaticTopK(max(round(topk * (1 - share)), 1)))
    elif share:
        calibrate_threshold(student.chunks, rows, share, lambda chunks, row: forward_model(chunks[0], row))
    stats.reset(student.chunks)
    groups = [
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    ]
    with Traffic(groups) as traffic:
        stepper.step(rows)
    # Without gradients and masked, so the same for every share.
    with Traffic(groups) as teacher:
        Teacher(student.chunks, "shared").hidden_states(rows, options.seq_length)
    routers = stats.routers(student.chunks)
    slots = sum(int(router.routing_stats.slots) for router in routers)
    real = slots - sum(int(router.routing_stats.zero_slots) for router in routers)
    return _figures(traffic.messages, teacher.messages, slots, real)


def random_rows(options, vocab: int) -> list:
    """This rank's rows: one sequence of random tokens each, no padding."""
    length, rank = options.seq_length, torch.distributed.get_rank()
    draw = torch.Generator().manual_seed(1234 + rank)
    rows = []
    for _ in range(options.micro_batches):
        tokens = torch.randint(0, vocab, (1, length), generator=draw)
        rows.append(
            PackedBatch(
                tokens=tokens,
                labels=tokens.roll(-1, 1),
                loss_mask=torch.ones(1, length),
                position_ids=torch.arange(length)[None],
                padding_mask=torch.zeros(1, length, dtype=torch.bool),
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                max_seqlen=length,
            )
        )
    return rows


def _figures(messages: list, teacher: list, slots: int, real: int) -> dict:
    """Sums over all ranks of what one rank saw."""
    rows = [m for m in messages if m.operator == "all_to_all" and len(m.shape) == 2]
    weights = [m for m in messages if m.operator == "all_to_all" and len(m.shape) == 1]
    rest = [m for m in messages if m.operator != "all_to_all"]
    counted = {
        "slots": slots,
        "real_slots": real,
        # Forward, every row travels twice: to its expert and back.
        "rows_there_and_back": sum(m.shape[0] for m in rows if not m.backward),
        "rows_forward": sum(m.bytes for m in rows if not m.backward),
        "rows_backward": sum(m.bytes for m in rows if m.backward),
        "probabilities": sum(m.bytes for m in weights),
        "gathers": sum(m.bytes for m in rest),
        "bytes": sum(m.bytes for m in messages),
        "sent": sum(m.sent for m in messages),
        "teacher_bytes": sum(m.bytes for m in teacher),
        "teacher_sent": sum(m.sent for m in teacher),
    }
    total = torch.tensor(list(counted.values()), dtype=torch.int64)
    if torch.distributed.get_world_size() > 1:
        total = total.to("cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(total)
    made = dict(zip(counted, total.tolist()))
    return made | {"zero_share": 1 - made["real_slots"] / made["slots"]}


def measure_all(options, hf_config: str | None) -> list[dict]:
    """One row per zero share; then, for paired routing, a control that must not shrink."""
    shares = options.shares
    arms = [(f"{share:g}", share, {}) for share in shares]
    if options.routing == "paired" and len(shares) > 1:
        # Such a head learns from all picks, so all are dispatched (straight-through).
        arms.append((f"{shares[1]:g}, the head trains", shares[1], {"paired_head_lr": 1e-4}))
    made = [{"arm": name} | measure(options, share, hf_config, **fields) for name, share, fields in arms]
    return [row | {key + "_ratio": row[key] / made[0][key] for key in ("bytes", "sent")} for row in made]
