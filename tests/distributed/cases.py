"""What the workers are asked to do. Default and slow cases run in one torchrun each."""

from __future__ import annotations

STEPS = {"train_iters": 3, "lr": 1e-3, "lr_warmup_fraction": 0.0}
SAMPLED = {"max_new_tokens": 6, "temperature": 1.0, "generate_batch_size": 2}

HEAD = {"paired_head_lr": 1e-2}
STAGE2 = {"stage": "2", "samples_per_prompt": 2, "global_batch_size": 10, "generate_batch_size": 3}
"""Ten answers make three rows: one of two data-parallel ranks gets a row of padding."""
# The reverse KL of this start is tiny, and where a gradient is below Adam's epsilon, rounding would decide the update.
STAGE2 |= {"adam_eps": 1e-6}
GLM = {"adam_eps": 1e-6}
"""For the same reason: gradients of latents that few tokens move."""
MTP = GLM | {"mtp_loss_scale": 0.5}
ALIGNED = {"pad_seq_to_mult": 4}
LORA = {"trainable": "lora", "lora_rank": 8, "lora_alpha": 64, "teacher_memory": "shared", "adam_eps": 1e-6}
MATCHED = {"hidden_loss_coeff": 5.0, "adam_eps": 1e-6}
EVALUATED = {"eval_rows": 3, "eval_interval": 2}
"""Three rows: two data-parallel ranks have one silent row between them."""
FAMILIES = (
    "glm4_moe",
    "deepseek_v3",
    "deepseek_v2",
    "gpt_oss",
    "minimax_m2",
    "olmoe",
    "qwen2_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
)
"""Families (`families.FAMILIES`) that have rows of one kind: what is theirs alone lies in attention and router."""
SPLIT = tuple(name for name in FAMILIES if not name.startswith(("qwen3_next", "qwen3_5")))
"""Those whose sequences may be split; linear attention has a state that goes through all of one."""
USUAL = ("deepseek_v3", "gpt_oss", "minimax_m2", "qwen3_next")
"""Those of the default suite: between them they have every word that the others have."""
WORLD_FLAGS = {
    "plain": {},
    "odd": {},
    "deep": {},
    "six": {},
    "aligned": ALIGNED,
    "aligned paired": ALIGNED,
    "ce": {"distill_loss": "ce"},
    "router": ALIGNED | {"trainable": "router"},
    "norms": ALIGNED | {"trainable": "router+norms"},
    "lora": ALIGNED | LORA,
    "glm lora": LORA,
    "qwen3_next lora": LORA,
    "stage 2 lora": STAGE2 | LORA | {"teacher_load": None},
    "reverse": {"distill_loss": "reverse_kl"},
    "jsd": {"distill_loss": "jsd"},
    "adamoe": {"group_loss_variant": "adamoe", "renormalize_after_drop": True},
    "rows": ALIGNED | {"calculate_per_token_loss": False},
    "matched": MATCHED,
    "matched aligned": MATCHED | ALIGNED,
    "matched deep": MATCHED,
    "matched paired": MATCHED,
    "matched glm": MATCHED | GLM,
    "matched rows": MATCHED | ALIGNED | {"calculate_per_token_loss": False},
    "stage 2 matched": STAGE2 | MATCHED,
    "paired": {},
    "paired head": HEAD,
    "awake": {},
    "awake aligned": ALIGNED,
    "awake head": HEAD,
    "stage 2": STAGE2,
    "stage 2 sampled": STAGE2 | {"distill_loss": "sampled_reverse_kl"},
    "stage 2 replay": STAGE2 | {"routing_replay": True},
    "stage 2 paired": STAGE2 | {"moe_router_load_balancing_type": "none"},
    "stage 2 rounds": STAGE2 | {"rollout_batch_size": 5},
    "stage 2 aligned": STAGE2 | ALIGNED,
    "stage 2 replay aligned": STAGE2 | ALIGNED | {"routing_replay": True},
    "stage 2 deep": STAGE2,
    "stage 2 odd": STAGE2,
    "stage 2 replay odd": STAGE2 | {"routing_replay": True},
    "glm": GLM,
    "glm aligned": GLM | ALIGNED,
    "stage 2 glm": STAGE2,
    "stage 2 glm aligned": STAGE2 | ALIGNED,
    "stage 2 replay glm": STAGE2 | {"routing_replay": True},
    "glm deep": GLM,
    "stage 2 glm deep": STAGE2 | GLM,
    "mtp": MTP,
    "mtp paired": MTP,
    "stage 2 mtp": STAGE2 | MTP,
    "evaluated": EVALUATED,
    "evaluated deep": EVALUATED,
    "evaluated aligned": ALIGNED | EVALUATED,
    "evaluated paired": EVALUATED,
    **{name: GLM for name in FAMILIES},
    **{f"{name} aligned": GLM | ALIGNED for name in SPLIT},
    **{f"stage 2 {name}": STAGE2 for name in FAMILIES},
    **{f"stage 2 {name} aligned": STAGE2 | ALIGNED for name in SPLIT},
}
"""World -> flags of every run in it. In `paired head` the head of paired zero experts trains too."""


def family_of(world: str) -> str:
    """The family in a world's name; empty for the other worlds."""
    return next((name for name in FAMILIES if name in world.split()), "")


def case(name, do="train", world="plain", flags=None, slow=False, **layout):
    """One case; keyword arguments are parallel sizes."""
    steps = "train" in do or do in ("interrupted", "moved", "changed", "diverged", "guarded", "damaged")
    flags = (STEPS if steps else {}) | WORLD_FLAGS[world] | (flags or {})
    return {"name": name, "do": do, "world": world, "layout": layout, "flags": flags, "slow": slow}


TRAIN = [
    case("dp2"),
    case("ep2 alltoall", ep=2),
    case("ep2 allgather", ep=2, flags={"moe_token_dispatcher_type": "allgather"}, slow=True),
    case("ep2 fused", "train_on_stand_ins", ep=2, flags={"moe_permute_fusion": True}, slow=True),
    case("tp2 sp", tp=2),
    case("tp2 etp2", tp=2, etp=2, slow=True),
    case("pp2", pp=2),
    case("pp2 odd", world="odd", pp=2, slow=True),
    case("pp2 vpp2", world="deep", pp=2, vpp=2),
    case("pp2 1+3", world="deep", pp=2, first=1, slow=True),
    case("pp2 3+1", world="deep", pp=2, last=1, slow=True),
    case(
        "pp2 1+3 alongside", world="deep", pp=2, first=1, flags={"teacher_schedule": "alongside"}, slow=True
    ),
    case("pp2 2+4 vpp2", world="six", pp=2, vpp=2, first=2, slow=True),
    case("glm pp2 1+3", world="glm deep", pp=2, first=1, slow=True),
    case("glm pp2 3+1", world="glm deep", pp=2, last=1, slow=True),
    case("cp2", world="aligned", cp=2),
    case("cp2 ep2", world="aligned", cp=2, ep=2, slow=True),
    case("cp2 paired", world="aligned paired", cp=2, slow=True),
    case("pp2 alongside", pp=2, flags={"teacher_schedule": "alongside"}, slow=True),
    case("dp2 alongside", flags={"teacher_schedule": "alongside"}, slow=True),
    case("tp2 odd", world="odd", tp=2, slow=True),
    case("paired ep2", world="paired", ep=2),
    case("paired tp2", world="paired", tp=2, slow=True),
    case("awake ep2", world="awake", ep=2),
    case("awake tp2", world="awake", tp=2, slow=True),
    case("awake pp2", world="awake", pp=2, slow=True),
    case("awake cp2", world="awake aligned", cp=2, slow=True),
    case("awake head ep2", world="awake head", ep=2, slow=True),
    case("awake head tp2 full", world="awake head", tp=2, flags={"recompute_granularity": "full"}, slow=True),
    case("awake pp2 selective", world="awake", pp=2, flags={"recompute_granularity": "selective"}, slow=True),
    case("paired head dp2", world="paired head", slow=True),
    case("paired head tp2", world="paired head", tp=2, slow=True),
    case("paired pp2", world="paired", pp=2, slow=True),
    case("paired head ep2", world="paired head", ep=2, slow=True),
    case(
        "paired head pp2 selective",
        world="paired head",
        pp=2,
        flags={"recompute_granularity": "selective"},
        slow=True,
    ),
    case(
        "paired ep2 allgather",
        world="paired",
        ep=2,
        flags={"moe_token_dispatcher_type": "allgather"},
        slow=True,
    ),
    case("mtp tp2", world="mtp", tp=2),
    case("mtp ep2", world="mtp", ep=2),
    case("mtp dp2", world="mtp", slow=True),
    case("mtp tp2 ep2", world="mtp", tp=2, ep=2, slow=True),
    case("mtp ep2 sharded", world="mtp", ep=2, flags={"use_distributed_optimizer": True}, slow=True),
    case("mtp paired tp2", world="mtp paired", tp=2, slow=True),
    case("mtp paired ep2", world="mtp paired", ep=2, slow=True),
    case("mtp tp2 full", world="mtp", tp=2, flags={"recompute_granularity": "full"}, slow=True),
    case("mtp dp2 alongside", world="mtp", flags={"teacher_schedule": "alongside"}, slow=True),
    case("matched tp2", world="matched", tp=2, slow=True),
    case("matched pp2", world="matched", pp=2),
    case("matched paired ep2", world="matched paired", ep=2, slow=True),
    case("matched cp2", world="matched aligned", cp=2),
    case("matched dp2", world="matched", slow=True),
    case("matched rows cp2", world="matched rows", cp=2, slow=True),
    case("matched glm tp2", world="matched glm", tp=2, slow=True),
    case("matched pp2 vpp2", world="matched deep", pp=2, vpp=2, slow=True),
    case("matched pp2 alongside", world="matched", pp=2, flags={"teacher_schedule": "alongside"}, slow=True),
    case("matched pp2 full", world="matched deep", pp=2, flags={"recompute_granularity": "full"}, slow=True),
    case(
        "matched pp2 vpp2 selective offload",
        world="matched deep",
        pp=2,
        vpp=2,
        flags={"recompute_granularity": "selective", "teacher_memory": "offload"},
        slow=True,
    ),
    case("matched stage 2 ep2", world="stage 2 matched", ep=2, slow=True),
    case("ce tp2", world="ce", tp=2, slow=True),
    *(
        case(f"ce {name}", world="ce", slow=True, **layout)
        for name, layout in {"dp2": {}, "ep2": {"ep": 2}, "pp2": {"pp": 2}}.items()
    ),
    *(
        case(f"{loss} {name}2", world=loss, slow=True, **{name: 2})
        for loss in ("reverse", "jsd")
        for name in ("tp", "ep", "pp")
    ),
    case("adamoe tp2", world="adamoe", tp=2, slow=True),
    case("evaluated ep2", world="evaluated", ep=2, slow=True),
    case("evaluated tp2", world="evaluated", tp=2, slow=True),
    case("evaluated pp2", world="evaluated", pp=2),
    case("evaluated dp2", world="evaluated", slow=True),
    case("evaluated cp2", world="evaluated aligned", cp=2, slow=True),
    case("evaluated pp2 vpp2", world="evaluated deep", pp=2, vpp=2, slow=True),
    case("evaluated paired ep2", world="evaluated paired", ep=2, slow=True),
    case("rows cp2", world="rows", cp=2, slow=True),
    *(
        case(f"rows {name}", world="rows", slow=True, **layout)
        for name, layout in {"dp2": {}, "ep2": {"ep": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}.items()
    ),
    case("glm tp2", world="glm", tp=2),
    case("glm ep2", world="glm", ep=2, slow=True),
    case("glm pp2", world="glm", pp=2, slow=True),
    case("glm cp2", world="glm aligned", cp=2, slow=True),
    case("glm tp2 ep2", world="glm", tp=2, ep=2, slow=True),
    case("glm dp2", world="glm", slow=True),
    *(case(f"{name} tp2 ep2", world=name, tp=2, ep=2, slow=name not in USUAL) for name in FAMILIES),
    *(
        case(f"{name} {layout}2", world=name, slow=True, **{layout: 2})
        for name in FAMILIES
        for layout in ("tp", "ep", "pp")
    ),
    *(case(f"{name} cp2", world=f"{name} aligned", cp=2, slow=True) for name in SPLIT),
    *(
        case(f"{name} tp2 full", world=name, tp=2, flags={"recompute_granularity": "full"}, slow=True)
        for name in FAMILIES
    ),
    case("tp2 ep2", tp=2, ep=2, slow=True),
    case("ep2 recompute", ep=2, flags={"recompute_granularity": "full"}, slow=True),
    case("ep2 selective", ep=2, flags={"recompute_granularity": "selective"}, slow=True),
    case(
        "ep2 fused selective",
        "train_on_stand_ins",
        ep=2,
        flags={"moe_permute_fusion": True, "recompute_granularity": "selective"},
        slow=True,
    ),
    case("ep2 loop", ep=2, flags={"expert_backend": "loop"}, slow=True),
    case("ep2 kernels", ep=2, flags={"expert_backend": "kernels"}, slow=True),
    *(
        case(f"{world} {memory} {name}", world=world, flags={"teacher_memory": memory}, slow=True, **layout)
        for world, memory in (("router", "offload"), ("router", "shared"), ("norms", "shared"))
        for name, layout in {"ep2": {"ep": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}}.items()
    ),
    case("lora tp2 ep2", world="lora", tp=2, ep=2),
    *(
        case(f"lora {name}", world="lora", slow=True, **layout)
        for name, layout in {
            "dp2": {},
            "ep2": {"ep": 2},
            "tp2": {"tp": 2},
            "pp2": {"pp": 2},
            "cp2": {"cp": 2},
        }.items()
    ),
    *(
        case(
            f"lora {name}2 {how}", world="lora", flags={"recompute_granularity": how}, slow=True, **{name: 2}
        )
        for name, how in (("tp", "full"), ("ep", "selective"))
    ),
    case("lora ep2 loop", world="lora", ep=2, flags={"expert_backend": "loop"}, slow=True),
    case("lora dp2 sharded", world="lora", flags={"use_distributed_optimizer": True}, slow=True),
    *(
        case(f"{world} {name}2", world=world, slow=True, **{name: 2})
        for world in ("glm lora", "qwen3_next lora")
        for name in ("tp", "ep", "pp")
    ),
    case(
        "shared pp2 alongside",
        world="router",
        pp=2,
        flags={"teacher_memory": "shared", "teacher_schedule": "alongside"},
        slow=True,
    ),
]
STAGE_2 = [
    case("stage 2 lora tp2", world="stage 2 lora", tp=2, slow=True),
    case("stage 2 lora ep2", world="stage 2 lora", ep=2, slow=True),
    case("stage 2 lora pp2", world="stage 2 lora", pp=2, slow=True),
    case("stage 2 dp2", world="stage 2", slow=True),
    case("stage 2 ep2", world="stage 2", ep=2),
    case("stage 2 tp2", world="stage 2", tp=2, slow=True),
    case("stage 2 tp2 etp2", world="stage 2", tp=2, etp=2, slow=True),
    case(
        "stage 2 ep2 sharded full",
        world="stage 2",
        ep=2,
        flags={"recompute_granularity": "full", "use_distributed_optimizer": True},
        slow=True,
    ),
    case("stage 2 sampled ep2", world="stage 2 sampled", ep=2, slow=True),
    case("stage 2 replay dp2", world="stage 2 replay", slow=True),
    case("stage 2 replay tp2", world="stage 2 replay", tp=2, slow=True),
    case("stage 2 paired ep2", world="stage 2 paired", ep=2, slow=True),
    case("stage 2 rounds dp2", world="stage 2 rounds", slow=True),
    case("stage 2 pp2", world="stage 2", pp=2),
    case("stage 2 cp2", world="stage 2 aligned", cp=2),
    case("stage 2 replay pp2", world="stage 2 replay", pp=2, slow=True),
    case("stage 2 replay cp2", world="stage 2 replay aligned", cp=2, slow=True),
    case("stage 2 cp2 ep2", world="stage 2 aligned", cp=2, ep=2, slow=True),
    case("stage 2 pp2 vpp2", world="stage 2 deep", pp=2, vpp=2, slow=True),
    case("stage 2 pp2 1+3", world="stage 2 deep", pp=2, first=1, slow=True),
    case("stage 2 pp2 3+1", world="stage 2 deep", pp=2, last=1, slow=True),
    case("stage 2 glm pp2 1+3", world="stage 2 glm deep", pp=2, first=1, slow=True),
    case("stage 2 glm pp2 3+1", world="stage 2 glm deep", pp=2, last=1, slow=True),
    case("stage 2 pp2 odd", world="stage 2 odd", pp=2, slow=True),
    case("stage 2 replay pp2 odd", world="stage 2 replay odd", pp=2, slow=True),
    case("stage 2 mtp ep2", world="stage 2 mtp", ep=2, slow=True),
    case("stage 2 mtp tp2", world="stage 2 mtp", tp=2, slow=True),
    case("stage 2 glm ep2", world="stage 2 glm", ep=2, slow=True),
    case("stage 2 glm tp2", world="stage 2 glm", tp=2, slow=True),
    case("stage 2 glm pp2", world="stage 2 glm", pp=2, slow=True),
    case("stage 2 glm cp2", world="stage 2 glm aligned", cp=2, slow=True),
    case("stage 2 replay glm ep2", world="stage 2 replay glm", ep=2, slow=True),
    *(
        case(f"stage 2 {name} {layout}2", world=f"stage 2 {name}", slow=True, **{layout: 2})
        for name in FAMILIES
        for layout in ("tp", "ep", "pp")
    ),
    *(case(f"stage 2 {name} cp2", world=f"stage 2 {name} aligned", cp=2, slow=True) for name in SPLIT),
    case("stage 2 alongside", world="stage 2", flags={"teacher_schedule": "alongside"}, slow=True),
    *(
        case(f"stage 2 {kind} {name}", world=f"stage 2 {kind}", slow=True, **layout)
        for kind, name, layout in (
            ("sampled", "dp2", {}),
            ("sampled", "tp2", {"tp": 2}),
            ("replay", "ep2", {"ep": 2}),
            ("paired", "dp2", {}),
            ("paired", "tp2", {"tp": 2}),
            ("rounds", "ep2", {"ep": 2}),
        )
    ),
]
REPLAYED = [
    case("replayed dp2", "replayed", world="stage 2 replay"),
    case("replayed pp2", "replayed", world="stage 2 replay", pp=2, slow=True),
    case("replayed pp2 odd", "replayed", world="stage 2 replay odd", pp=2, slow=True),
    case("replayed cp2", "replayed", world="stage 2 replay aligned", cp=2, slow=True),
]
MASKED = [
    *(case(f"masked {name}2", "masked", **{name: 2}) for name in ("ep", "tp", "pp")),
    case("masked cp2", "masked", world="aligned", cp=2, slow=True),
    case("masked glm tp2", "masked", world="glm", tp=2, slow=True),
    case("masked pp2 1+3", "masked", world="deep", pp=2, first=1, slow=True),
    case("masked pp2 vpp2", "masked", world="deep", pp=2, vpp=2, slow=True),
]
STARVED = [
    case(
        f"starved {dispatcher} {backend}",
        "starved",
        ep=2,
        flags={"dispatcher": dispatcher, "backend": backend},
        slow=backend == "loop",
    )
    for dispatcher in ("alltoall", "allgather")
    for backend in ("loop", "grouped_mm")
]
FUSED = [case(f"fused {d}", "fused", ep=2, flags={"dispatcher": d}) for d in ("alltoall", "allgather")]
FUSED += [case("fused alltoall etp2", "fused", tp=2, etp=2, flags={"dispatcher": "alltoall"}, slow=True)]
FLEX = [case(f"flex {b}", "flex", ep=2, flags={"backend": b}) for b in ("deepep", "hybridep")]
FLEX += [case("flex deepep etp2", "flex", tp=2, etp=2, flags={"backend": "deepep"}, slow=True)]
FLEX_FLAGS = {"bf16": True, "moe_token_dispatcher_type": "flex", "moe_permute_fusion": True}
ANSWERS = [
    case("answers dp2", "answers", flags=SAMPLED, slow=True),
    case("answers ep2", "answers", flags=SAMPLED, ep=2),
    case("answers tp2", "answers", flags=SAMPLED, tp=2),
    case("answers pp2", "answers", flags=SAMPLED, pp=2),
    case("answers pp2 odd", "answers", world="odd", flags=SAMPLED, pp=2, slow=True),
    case("answers pp2 vpp2", "answers", world="deep", flags=SAMPLED, pp=2, vpp=2, slow=True),
    case("answers pp2 1+3", "answers", world="deep", flags=SAMPLED, pp=2, first=1, slow=True),
    case("answers glm pp2 3+1", "answers", world="glm deep", flags=SAMPLED, pp=2, last=1, slow=True),
    case("answers cp2", "answers", flags=SAMPLED, cp=2),
    case("answers cp2 ep2", "answers", flags=SAMPLED, cp=2, ep=2, slow=True),
    case("answers glm tp2", "answers", world="glm", flags=SAMPLED, tp=2, slow=True),
    case("answers glm pp2", "answers", world="glm", flags=SAMPLED, pp=2, slow=True),
    case("answers glm cp2", "answers", world="glm", flags=SAMPLED, cp=2, slow=True),
    case("answers tp2 ep2", "answers", flags=SAMPLED, tp=2, ep=2, slow=True),
]
SHARDED = {"use_distributed_optimizer": True}
OFFLOADED = SHARDED | {"bf16": True, "optimizer_cpu_offload": True}
ASYNC = {"async_save": True, "save_interval": 1}
UNEVEN = [
    case("uneven plain", "interrupted", world="odd", pp=2),
    case("uneven routers", "interrupted", world="odd", pp=2, flags={"trainable": "router"}, slow=True),
    case("uneven lora", "interrupted", world="odd", pp=2, flags=LORA, slow=True),
    case("uneven bf16", "interrupted", world="odd", pp=2, flags={"bf16": True}, slow=True),
    case("uneven offloaded", "interrupted", world="odd", pp=2, flags=OFFLOADED, slow=True),
    case("uneven sharded", "interrupted", world="odd", pp=2, flags=SHARDED, slow=True),
]
OTHERS = [
    case("interrupted ep2", "interrupted", ep=2),
    case("sharded optimizer dp2", "interrupted", flags=SHARDED),
    case("sharded optimizer ep2", "interrupted", flags=SHARDED, ep=2, slow=True),
    case("async ep2", "interrupted", ep=2, flags=ASYNC),
    case("offloaded ep2", "interrupted", ep=2, flags=OFFLOADED),
    case("bf16 sharded ep2", "interrupted", ep=2, flags=SHARDED | {"bf16": True}),
    case("diverged ep2", "diverged", ep=2),
    case("guarded ep2", "guarded", ep=2),
    case("damaged ep2", "damaged", ep=2),
    case("bf16 ep2", ep=2, flags={"bf16": True}, slow=True),
    case("stock flex", "stock_flex", ep=2),
    case("flex zero outputs", "zero_outputs", ep=2),
    case("bf16 ep2 flex", "train_on_stand_ins", ep=2, flags=FLEX_FLAGS),
    case("unwritable dp2", "unwritable", flags={"train_iters": 1}),
    case("wide scope dp2", "wide_scope"),
    case("wide scope adamoe dp2", "wide_scope", flags={"group_loss_variant": "adamoe"}, slow=True),
    case("initial dp2", "initial"),
    case("initial ep2", "initial", ep=2),
    case(
        "allgather answers ep2", "answers", flags=SAMPLED | {"moe_token_dispatcher_type": "allgather"}, ep=2
    ),
]
MOVED = [
    # Saved by two processes after two steps, loaded by two processes under another layout (`then`).
    case("ep2 then tp2", "moved", ep=2, flags={"then": {"tp": 2}}),
    case("pp2 then ep2", "moved", pp=2, flags={"then": {"ep": 2}}, slow=True),
    case("async tp2 then pp2", "moved", tp=2, flags=ASYNC | {"then": {"pp": 2}}, slow=True),
    case("sharded ep2 then sharded tp2", "moved", ep=2, flags=SHARDED | {"then": {"tp": 2}}),
    case("pp2 1+3 then pp2", "moved", world="deep", pp=2, first=1, flags={"then": {"pp": 2}}, slow=True),
    case(
        "sharded pp2 3+1 then sharded pp2 1+3",
        "moved",
        world="deep",
        pp=2,
        last=1,
        flags=SHARDED | {"then": {"pp": 2, "first": 1}},
        slow=True,
    ),
    case("lora ep2 then tp2", "moved", world="lora", ep=2, flags={"then": {"tp": 2}}),
    case("lora pp2 then ep2", "moved", world="lora", pp=2, flags={"then": {"ep": 2}}, slow=True),
    case(
        "lora sharded ep2 then sharded tp2",
        "moved",
        world="lora",
        ep=2,
        flags=SHARDED | {"then": {"tp": 2}},
        slow=True,
    ),
    case("dp2 then pp2", "moved", flags={"then": {"pp": 2}}, slow=True),
    case("tp2 then ep2", "moved", tp=2, flags={"then": {"ep": 2}}, slow=True),
    case("sharded dp2 then sharded pp2", "moved", flags=SHARDED | {"then": {"pp": 2}}, slow=True),
    case(
        "async sharded ep2 then sharded dp2", "moved", ep=2, flags=SHARDED | ASYNC | {"then": {}}, slow=True
    ),
]
CHANGED = [
    case("sharded ep2 then plain tp2", "changed", ep=2, flags=SHARDED | {"then": {"tp": 2}}),
    case("plain ep2 then sharded tp2", "changed", ep=2, flags={"then": {"tp": 2}}, slow=True),
]
RESUMED = [
    case("resumed tp2", flags={"load": "HALFWAY"}, tp=2, slow=True),
    case("resumed ep2", flags={"load": "HALFWAY"}, ep=2, slow=True),
    case("resumed pp2", flags={"load": "HALFWAY"}, pp=2, slow=True),
]
TWO_PROCESSES = (
    TRAIN
    + STAGE_2
    + REPLAYED
    + MASKED
    + STARVED
    + FUSED
    + FLEX
    + ANSWERS
    + UNEVEN
    + OTHERS
    + RESUMED
    + MOVED
    + CHANGED
)
FOUR_PROCESSES = [
    case("glm tp2 pp2 ep2", world="glm", tp=2, pp=2, ep=2, slow=True),
    case("tp2 pp2 ep2", tp=2, pp=2, ep=2, slow=True),
    case("tp2 dp2 ep2", tp=2, ep=2, slow=True),
    case("tp2 dp2 ep4", tp=2, ep=4, slow=True),
    case("tp2 dp2", tp=2, slow=True),
    case("evaluated tp2 dp2", world="evaluated", tp=2, slow=True),
    case("pp2 ep2", pp=2, ep=2, slow=True),
    case("ep2 dp2", ep=2, slow=True),
    case("cp2 tp2", world="aligned", cp=2, tp=2, slow=True),
    case("cp2 pp2", world="aligned", cp=2, pp=2, slow=True),
    case("cp2 tp2 ep2 paired", world="aligned paired", cp=2, tp=2, ep=2, slow=True),
    case("pp2 vpp2 ep2", world="deep", pp=2, vpp=2, ep=2, slow=True),
    case("pp2 tp2 alongside", pp=2, tp=2, flags={"teacher_schedule": "alongside"}, slow=True),
    case("stage 2 tp2 ep2", world="stage 2", tp=2, ep=2, slow=True),
    case("stage 2 tp2 dp2 ep4", world="stage 2", tp=2, ep=4, slow=True),
    case("stage 2 replay tp2 dp2", world="stage 2 replay", tp=2, slow=True),
    case("stage 2 tp2 pp2 ep2", world="stage 2", tp=2, pp=2, ep=2, slow=True),
    case("stage 2 pp2 ep2", world="stage 2", pp=2, ep=2, slow=True),
    case("stage 2 pp2 vpp2 dp2", world="stage 2 deep", pp=2, vpp=2, slow=True),
    case("stage 2 cp2 pp2", world="stage 2 aligned", cp=2, pp=2, slow=True),
    case("stage 2 replay cp2 dp2", world="stage 2 replay aligned", cp=2, slow=True),
    case("paired head tp2 pp2 ep2", world="paired head", tp=2, pp=2, ep=2, slow=True),
]
