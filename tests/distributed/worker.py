"""One rank of a parallel run: `torchrun worker.py JOB.json`. Works through the cases that the job lists.

Each case writes OUT/<name>.<rank>.json; an exception is written there too, so that a test can show it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402

from zeda_megatron.runtime import cpu  # noqa: E402

cpu.install()

import deepep_buffer  # noqa: E402
import own_kernels  # noqa: E402
import tiny  # noqa: E402
import tiny_world  # noqa: E402
from fused_kernels import FusedKernels  # noqa: E402
from layer_cases import flex, fused, stock_flex, zero_outputs  # noqa: E402, F401
from megatron.core import parallel_state  # noqa: E402
from pytest import MonkeyPatch  # noqa: E402

from zeda_megatron.config.parallel import ParallelConfig  # noqa: E402
from zeda_megatron.config.zero_experts import ZeroExpertConfig  # noqa: E402
from zeda_megatron.errors import UserError  # noqa: E402
from zeda_megatron.moe.router_dials import zero_mask  # noqa: E402
from zeda_megatron.runtime.process_groups import initialize  # noqa: E402
from zeda_megatron.runtime.whole_folder import new_folder  # noqa: E402
from zeda_megatron.training.stage0 import run_stage0  # noqa: E402

own_kernels.install()

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
}


def sizes_of(layout: dict) -> dict:
    return {SIZES[key]: value for key, value in layout.items()}


def train(world, out: Path, layout: dict, flags: dict) -> dict:
    """A whole run with our own loop; its checkpoint and metrics stay in OUT."""
    run = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    before = tiny_world.weight_hash(run.teacher)
    code = run.run()
    return {
        "code": code,
        "iteration": run.iteration,
        "teacher_still": tiny_world.weight_hash(run.teacher) == before,
        "given_out": tiny_world.given_out(run.student) if flags.get("trainable") == "lora" else None,
    }


def train_on_stand_ins(world, out: Path, layout: dict, flags: dict) -> dict:
    """The same with stand-ins for Transformer Engine's permutation and for DeepEP."""
    with MonkeyPatch.context() as patch:
        kernels = FusedKernels().install(patch)
        deepep, _ = deepep_buffer.install(patch, parallel_state.get_expert_model_parallel_group())
        made = train(world, out, layout, flags)
    return made | {"asked": {"permute": len(kernels.allocated), "deepep": len(deepep.indices_seen)}}


def interrupted(world, out: Path, layout: dict, flags: dict) -> dict:
    """The last rank alone gets SIGTERM in the second step; then the run is taken up again."""
    run = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    step, last = run.stepper.step, torch.distributed.get_world_size() - 1

    def step_with_signal(*given):
        if run.iteration == 1 and torch.distributed.get_rank() == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    run.stepper.step = step_with_signal
    code, stopped = run.run(), run.iteration
    again = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    return {"code": code, "stopped": stopped, "resumed": again.iteration, "end": again.run()}


def moved(world, out: Path, layout: dict, flags: dict) -> dict:
    """Two steps under one layout, the third under another, with the same processes."""
    flags, then = dict(flags), flags["then"]
    del flags["then"]
    first = tiny_world.start(world, save=out, exit_interval=2, **sizes_of(layout), **flags)
    first.run()
    end_groups()
    initialize(ParallelConfig(**sizes_of(then), distributed_timeout_minutes=2))
    again = tiny_world.start(world, save=out, **sizes_of(then), **flags)
    resumed = again.iteration
    return {"stopped": first.iteration, "resumed": resumed, "code": again.run(), "iteration": again.iteration}


def changed(world, out: Path, layout: dict, flags: dict) -> dict:
    """Saved with one kind of optimizer, loaded with the other."""
    flags, then = dict(flags), flags["then"]
    sharded = flags.pop("use_distributed_optimizer", False)
    del flags["then"]
    kind = {"use_distributed_optimizer": sharded}
    tiny_world.start(world, save=out, exit_interval=2, **sizes_of(layout), **flags, **kind).run()
    end_groups()
    initialize(ParallelConfig(**sizes_of(then), distributed_timeout_minutes=2))
    kind = {"use_distributed_optimizer": not sharded}
    try:
        again = tiny_world.start(world, save=out, **sizes_of(then), **flags, **kind)
    except UserError as error:
        return {"told": str(error)}
    return {"resumed": again.iteration, "code": again.run()}


def diverged(world, out: Path, layout: dict, flags: dict) -> dict:
    """An expert of the last rank gets NaN in the third step; the checkpoint of the second is still being written."""
    flags = flags | {"save_interval": 2, "async_save": True}
    run = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    step = run.stepper.step

    def spoiled(*given):
        if run.iteration == 2 and torch.distributed.get_rank() == 1:
            for fc1, _ in tiny.expert_weights(run.student.chunks[0].decoder.layers[0].mlp):
                fc1.data.fill_(float("nan"))
        return step(*given)

    run.stepper.step = spoiled
    try:
        run.run()
    except UserError as error:
        return {"told": str(error), "tracker": (out / "latest_checkpointed_iteration.txt").read_text()}
    return {"told": None}


def guarded(world, out: Path, layout: dict, flags: dict) -> dict:
    """The zero share is outside its band; the checkpoint of the second step is still being written."""
    guards = {"zero_share_band": (0.95, 1), "guard_window": 3}
    flags = flags | guards | {"save_interval": 2, "async_save": True}
    run = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    try:
        run.run()
    except UserError as error:
        return {"told": str(error), "tracker": (out / "latest_checkpointed_iteration.txt").read_text()}
    return {"told": None}


def damaged(world, out: Path, layout: dict, flags: dict) -> dict:
    """A file that the last rank has written is damaged: all ranks go back to the same older checkpoint."""
    tiny_world.start(world, save=out, save_interval=1, **sizes_of(layout), **flags).run()
    newest = out / "iter_0000003"
    if torch.distributed.get_rank() == 0:
        file = newest / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    torch.distributed.barrier()
    again = tiny_world.start(world, save=out, **sizes_of(layout), **flags)
    try:
        tiny_world.start(world, load=newest, **sizes_of(layout), **flags)
    except UserError as error:
        return {"resumed": again.iteration, "told": str(error)}
    return {"resumed": again.iteration, "told": None}


def unwritable(world, out: Path, layout: dict, flags: dict) -> dict:
    """Rank 0 alone writes, and cannot: what each rank is told, and how soon."""
    blocked = out.with_suffix(".file")
    if torch.distributed.get_rank() == 0:
        blocked.write_text("in the way")
    torch.distributed.barrier()
    answers = {"stage": "0", "pretrained_checkpoint": world.static, "data_path": world.prompts}
    answers |= {"rollout_path": blocked / "answers.jsonl", "max_new_tokens": 5}

    def new() -> None:
        with new_folder(blocked / "new", "--save"):
            pass

    attempts = {
        "new folder": new,
        "figures": lambda: tiny_world.start(world, metrics_path=blocked / "m.jsonl", **flags).run(),
        "stage 0": lambda: run_stage0(tiny_world.options(world, **answers)),
    }
    told, started = {}, time.monotonic()
    for name, attempt in attempts.items():
        try:
            attempt()
        except UserError as error:
            told[name] = str(error)
    return {"told": told, "waited": time.monotonic() - started > 60}


def masked(world, out: Path, layout: dict, flags: dict) -> dict:
    """Hidden states of the masked student and of the static model on this layout."""
    hidden = {}
    for name, balancing in (("dynamic", "grouped_aux_loss"), ("static", "none")):
        values = {"pretrained_checkpoint": getattr(world, name), "moe_router_load_balancing_type": balancing}
        run = tiny_world.start(world, **sizes_of(layout), **(flags | values))
        batches = run.feed.rows_of_rank(range(2))
        run.teacher.model_chunks = run.student.chunks  # its forward pass, on the student's own weights
        with zero_mask(run.student.chunks):
            hidden[name] = run.teacher.hidden_states(batches, 128)
        if name == "dynamic":
            run.student.chunks[0].eval()
            given_out = tiny_world.given_out(run.student)
    equal = all(torch.equal(a, b) for a, b in zip(hidden["dynamic"], hidden["static"], strict=True))
    return {
        "count": len(hidden["static"]),
        "equal": equal,
        "given_out": given_out,
        "hidden": [h.flatten(0, 1).tolist() for h in hidden["static"]],
    }


def starved(world, out: Path, layout: dict, flags: dict) -> dict:
    """`zero`: the tokens of rank 1 pick zero experts only. `both zero`: all tokens do. `idle`: all tokens pick
    experts of rank 0, so that rank 1 gets no token."""
    rank, worst = torch.distributed.get_rank(), {}
    for case in ("zero", "both zero", "idle"):
        overrides = {"moe_token_dispatcher_type": flags["dispatcher"], "expert_model_parallel_size": 2}
        layer = tiny.moe_layer(ZeroExpertConfig(4), overrides, backend=flags["backend"])
        whole = tiny.moe_layer_weights(ZeroExpertConfig(4))
        direction_H = torch.linspace(-1, 1, 32)
        with torch.no_grad():
            for weights in (layer.router.weight, whole["router"]):
                loved = slice(0, 3) if case == "idle" else slice(8, 11)
                weights[loved] = 40 * direction_H
            first = 4 * rank
            for e, (fc1, fc2) in enumerate(tiny.expert_weights(layer)):
                fc1.copy_(whole["experts"][first + e][0])
                fc2.copy_(whole["experts"][first + e][1])
            layer.router.weight.copy_(whole["router"])
        inputs = [tiny.hidden_states(13, seed=1).detach(), tiny.hidden_states(13, seed=2).detach()]
        for i in range(2):
            if case != "zero" or i == 1:
                inputs[i] = inputs[i] * 0.1 + direction_H
        mine = inputs[rank].clone().requires_grad_()
        output, _ = layer(mine)
        coefficients = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) for x in inputs]
        (output * coefficients[rank]).sum().backward()
        # The whole layer, densely, over both ranks' tokens.
        weights = [[fc.clone().requires_grad_() for fc in pair] for pair in whole["experts"]]
        inputs = [x.clone().requires_grad_() for x in inputs]
        total, picks = 0.0, []
        for x, c in zip(inputs, coefficients):
            flat_TH = x.reshape(-1, 32)
            routed = tiny.dense_routing(flat_TH @ whole["router"].t(), 3, 8)
            picks.append([int(routed.map_TE[:, part].sum()) for part in (slice(0, 4), slice(4, 8))])
            dense_TH = tiny.dense_experts(flat_TH, routed.real_TN, weights)
            total = total + (dense_TH * c.reshape(-1, 32)).sum()
            if x is inputs[rank]:
                worst[f"{case} output"] = tiny.gap(output.reshape(-1, 32), dense_TH)
        total.backward()
        # Rows from each rank to the experts of each rank.
        some = picks[0][0] > 0 and picks[0][1] > 0
        expected = {
            "zero": some and picks[1] == [0, 0],
            "both zero": picks == [[0, 0]] * 2,
            "idle": picks == [[39, 0]] * 2,
        }
        assert expected[case], picks
        worst[f"{case} input"] = tiny.gap(mine.grad, inputs[rank].grad)
        for e, pair in enumerate(tiny.expert_weights(layer)):
            for parameter, reference in zip(pair, weights[first + e]):
                assert parameter.grad is not None, f"{case}: expert {e} has no gradient"
                wanted = torch.zeros_like(parameter) if reference.grad is None else reference.grad
                difference = tiny.gap(parameter.grad, wanted)
                worst[f"{case} expert"] = max(difference, worst.get(f"{case} expert", 0.0))
    return {"worst": worst}


def answers(world, out: Path, layout: dict, flags: dict) -> dict:
    """Stage 0 on this layout."""
    from zeda_megatron.training.stage0 import run_stage0

    fields = {"stage": "0", "data_path": world.prompts, "rollout_path": out / "answers.jsonl"}
    run_stage0(tiny_world.options(world, **fields, **sizes_of(layout), **flags))
    return {}


def replayed(world, out: Path, layout: dict, flags: dict) -> dict:
    """Tokens of this rank's rows whose picks are fixed, per layer, and how many all rows together should have."""
    run = tiny_world.start(world, **sizes_of(layout), **flags)
    made = run.feed._roll_out(0)
    rows, _ = run.feed.packing.pack(made.answers, made)
    fixed_RSL = torch.cat([(row.picks >= 0).all(-1) for row in rows if row.picks is not None])
    fed = sum(len(answer.prompt_ids) + len(answer.response_ids) - 1 for answer in made.answers)
    return {"fixed": fixed_RSL.sum((0, 1)).tolist(), "fed": fed}


def wide_scope(world, out: Path, layout: dict, flags: dict) -> dict:
    """One step whose group loss counts the slots of both ranks together, and one whose does not."""
    made = {}
    for name, scope in (("narrow", "tp_cp"), ("wide", "tp_dp_cp")):
        run, rows = tiny_world.run_on_pairs(world, 64, scope, **flags)
        made[f"{name} norm"] = run.stepper.step(rows)["grad_norm"]
    gradients = {
        n: p.main_grad.tolist() for n, p in run.student.chunks[0].named_parameters() if "router" in n
    }
    return made | {"gradients": gradients}


def initial(world, out: Path, layout: dict, flags: dict) -> dict:
    """First weights of `--stage pretrain`: are experts of different ranks different?"""
    values = {"stage": "pretrain", "pretrained_checkpoint": None, "hf_config": world.hf}
    balancing = {"moe_router_load_balancing_type": "none"}
    run = tiny_world.start(world, **values, **balancing, **sizes_of(layout), **flags)
    layer = run.student.chunks[0].decoder.layers[0].mlp
    return {
        "experts": [float(fc1.sum()) for fc1, _ in tiny.expert_weights(layer)],
        "router": float(layer.router.weight.sum()),
    }


def end_groups() -> None:
    """End all groups but the default one.

    Megatron forgets its groups without ending them, and Gloo keeps threads for each: thousands after some cases.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    gc.collect()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out, rank = Path(job["out"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: the collections between cases need not look at it
    for case in job["cases"]:
        world = tiny_world.World(
            **{name: Path(path) for name, path in job["worlds"][case.get("world", "plain")].items()}
        )
        begun = time.process_time()
        try:
            end_groups()
            initialize(ParallelConfig(**sizes_of(case["layout"]), distributed_timeout_minutes=2))
            made = globals()[case["do"]](world, out / case["name"], case["layout"], case["flags"])
        except Exception as error:
            made = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        if "error" in made and not case.get("may_fail"):
            print(made["traceback"], file=sys.stderr, flush=True)
        made["cpu"] = round(time.process_time() - begun, 2)
        (out / f"{case['name']}.{rank}.json").write_text(json.dumps(made))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
