"""Starts the workers of parallel cases, and compares what they wrote with a run of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import tiny
import tiny_mtp
import tiny_world
from cases import FOUR_PROCESSES, STEPS, TWO_PROCESSES, WORLD_FLAGS, family_of
from families import FAMILIES

WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(processes: int, job: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "1"]
    command += ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(WORKER), str(job)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    # Into a file: a helper process that Megatron leaves behind after a crash would keep a pipe open for ever.
    terminal = job.with_name("terminal.txt")
    with open(terminal, "w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=1400)
    assert done.returncode == 0, terminal.read_text()[-4000:]


def make_worlds(folder: Path, plain: tiny_world.World) -> dict[str, tiny_world.World]:
    """All worlds by name."""
    from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
    from zeda_megatron.models.hf_config import describe_checkpoint
    from zeda_megatron.models.on_disk import read_facts
    from zeda_megatron.moe.paired import paired_modules

    flags = {"pretrained_checkpoint": plain.static, "zero_expert_routing": "paired"}
    run = tiny_world.start(plain, save=folder / "paired", **flags)
    for i, paired in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(paired, seed=i)
    run.save()
    with_heads = replace(plain, dynamic=folder / "paired")
    shutil.copytree(plain.static, folder / "to wake")
    zero = replace(run.student.zero, zero_experts_type="low_rank", stand_in_rank=3, paired_head_width=5)
    describe_checkpoint(folder / "to wake", plain.hf, read_facts(plain.static).with_zero(zero))
    run = tiny_world.start(plain, save=folder / "awake", pretrained_checkpoint=folder / "to wake")
    for i, layer in enumerate(run.student.chunks[0].decoder.layers):
        tiny.draw(layer.mlp.router.paired, seed=i)
        tiny.draw(layer.mlp.router.zero_output, seed=i)
    run.save()
    awake = replace(plain, dynamic=folder / "awake")
    # Its first layer is dense and its LM head is its embedding.
    odd = tiny_world.make_world(folder / "odd", mlp_only_layers=[0], tie_word_embeddings=True)
    deep = tiny_world.make_world(folder / "deep", num_hidden_layers=4)
    # Latent attention; with two layers the first pipeline stage has no MoE layer.
    glm = tiny_world.make_world(folder / "glm", tiny.glm_model, num_hidden_layers=2)
    glm_deep = tiny_world.make_world(folder / "glm deep", tiny.glm_model, num_hidden_layers=4)
    six = tiny_world.make_world(folder / "six", num_hidden_layers=6)
    mtp = tiny_world.make_world(folder / "mtp", tiny_mtp.WithHead, num_hidden_layers=2)
    mtp = replace(mtp, static=folder / "mtp static", dynamic=folder / "mtp dynamic")
    hf_to_megatron(mtp.hf, mtp.static, mtp=True)
    hf_to_megatron(mtp.hf, mtp.dynamic, num_zero_experts=4, mtp=True)
    flags = {"pretrained_checkpoint": mtp.static, "zero_expert_routing": "paired", "mtp_loss_scale": 1.0}
    run = tiny_world.start(mtp, save=folder / "mtp paired", **flags)
    for i, paired in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(paired, seed=i)
        paired.threshold.fill_(-1.0)  # if it kept all, the first step's gradient would be rounding alone
    run.save()
    mtp_paired = replace(mtp, dynamic=folder / "mtp paired")
    special = {
        "mtp paired": mtp_paired,
        "mtp": mtp,
        "odd": odd,
        "deep": deep,
        "six": six,
        "paired": with_heads,
        "awake": awake,
        "glm": glm,
    }

    @cache
    def of_family(name: str) -> tiny_world.World:
        # Two pairs of layers with experts, so that every pipeline stage has some.
        return tiny_world.make_world(folder / name, FAMILIES[name].make, num_hidden_layers=4)

    def of(name: str) -> tiny_world.World:
        if {"glm", "deep"} <= set(name.split()):
            return glm_deep
        family = family_of(name)
        if family:
            return of_family(family)
        if name in special:
            return special[name]
        return next((world for word, world in special.items() if word in name.split()), plain)

    return Worlds(of)


class Worlds(dict):
    """Worlds by name; those of families are made when they are asked for."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> tiny_world.World:
        self[name] = self._make(name)
        return self[name]


class Alone:
    """`alone[world]` -> (metrics, final state) of the run in one process."""

    def __init__(self, worlds: dict[str, tiny_world.World], folder: Path):
        self.worlds, self.folder, self.done = worlds, folder, {}

    def __getitem__(self, name: str):
        if name not in self.done:
            folder = self.folder / name
            run = tiny_world.start(self.worlds[name], save=folder, **(STEPS | WORLD_FLAGS[name]))
            run.run()
            self.done[name] = tiny_world.read_metrics(folder), tiny_world.snapshot(run)
        return self.done[name]


def group_of(case: dict) -> str:
    """Cases of one group run in one torchrun: the usual ones, the slow ones, and the slow ones of each family."""
    return f" slow {family_of(case['world'])}".rstrip() if case["slow"] else ""


class Runs:
    """`runs(name)` -> (results of all ranks, folder of what the case wrote)."""

    def __init__(self, worlds: dict, halfway: Path, folder: Path):
        self.worlds, self.halfway, self.folder, self.done = worlds, halfway, folder, {}

    def __call__(self, name: str) -> tuple[list[dict], Path]:
        if name not in self.done:
            self._start(name)
        return self.done[name]

    def _start(self, name: str) -> None:
        cases = next(
            cases for cases in (TWO_PROCESSES, FOUR_PROCESSES) if any(c["name"] == name for c in cases)
        )
        processes = 2 if cases is TWO_PROCESSES else 4
        asked = next(c for c in cases if c["name"] == name)
        cases = [c for c in cases if group_of(c) == group_of(asked)]
        if "ZEDA_CASES" in os.environ:  # for work on one layout: ZEDA_CASES="cp2,pp2 vpp2" pytest -k ...
            cases = [c for c in cases if c["name"] in os.environ["ZEDA_CASES"].split(",")]
        out = self.folder / f"{processes} processes{group_of(asked)}"
        out.mkdir()
        names = {c["world"] for c in cases}
        worlds = {n: {k: str(v) for k, v in asdict(self.worlds[n]).items()} for n in names}
        text = json.dumps({"out": str(out), "cases": cases, "worlds": worlds})
        (out / "job.json").write_text(text.replace("HALFWAY", str(self.halfway)))
        torchrun(processes, out / "job.json")
        for c in cases:
            files = [out / f"{c['name']}.{rank}.json" for rank in range(processes)]
            self.done[c["name"]] = ([json.loads(file.read_text()) for file in files], out / c["name"])


def differences(
    case: dict, folder: Path, worlds: dict, alone: Alone, first_step: int = 1
) -> dict[str, float]:
    """Largest differences between a case and one process: relative for what is logged, `tiny.gap` for tensors.

    `logged` is over all metrics and steps; `loss` and `grad_norm` are parts of it. `gradients` compares Adam's first
    moment, the decayed sum of the steps' gradients; `moments` also the second; `weights` all parameters and buffers.
    """
    metrics, wanted = alone[case["world"]]
    found = dict.fromkeys(("loss", "grad_norm", "logged", "gradients", "moments", "weights"), 0.0)
    for line, reference in zip(tiny_world.read_metrics(folder), metrics[first_step - 1 :], strict=True):
        assert line.keys() == reference.keys()
        for key in reference:
            pair = [x if isinstance(x, list) else [x] for x in (line[key], reference[key])]
            for a, b in zip(*pair, strict=True):
                gap = 0.0 if a == b else abs(a - b) / max(abs(b), 1.0)
                found["logged"] = max(found["logged"], gap)
                if key in found:
                    found[key] = max(found[key], gap)
    # One process reads what several wrote: resume under another layout.
    name = case["world"]
    sharded = {key: value for key, value in case["flags"].items() if key == "use_distributed_optimizer"}
    end = tiny_world.start(worlds[name], load=folder, **(STEPS | WORLD_FLAGS[name] | sharded))
    assert end.iteration == 3
    mine = tiny_world.snapshot(end)
    if sharded:  # a snapshot of it lacks the moments; the third step's weights come from them
        wanted = {key: tensor for key, tensor in wanted.items() if key.startswith("/model")}
    assert mine.keys() >= wanted.keys() and (sharded or mine.keys() == wanted.keys())
    for key in wanted:
        gap = tiny.gap(mine[key], wanted[key])
        kind = "weights" if key.startswith("/model") else "moments"
        found[kind] = max(found[kind], gap)
        if key.endswith("exp_avg"):
            found["gradients"] = max(found["gradients"], gap)
    return found
