"""Starts the workers, once per set of cases, when the first test asks for one of them."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import tiny_world
from cases import FOUR_PROCESSES, STEPS, TWO_PROCESSES, WORLD_FLAGS

from zeda_megatron.moe.paired import paired_modules

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


class Runs:
    """`runs(name)` -> (results of all ranks, folder of what the case wrote)."""

    def __init__(self, worlds: dict, halfway: Path, folder: Path):
        self.worlds = {name: {k: str(v) for k, v in asdict(world).items()} for name, world in worlds.items()}
        self.halfway, self.folder, self.done = halfway, folder, {}

    def __call__(self, name: str) -> tuple[list[dict], Path]:
        if name not in self.done:
            self._start(name)
        return self.done[name]

    def _start(self, name: str) -> None:
        cases = next(
            cases for cases in (TWO_PROCESSES, FOUR_PROCESSES) if any(c["name"] == name for c in cases)
        )
        processes = 2 if cases is TWO_PROCESSES else 4
        slow = next(c["slow"] for c in cases if c["name"] == name)
        cases = [c for c in cases if c["slow"] == slow]
        out = self.folder / f"{processes} processes{' slow' if slow else ''}"
        out.mkdir()
        text = json.dumps({"out": str(out), "cases": cases, "worlds": self.worlds})
        (out / "job.json").write_text(text.replace("HALFWAY", str(self.halfway)))
        torchrun(processes, out / "job.json")
        for c in cases:
            files = [out / f"{c['name']}.{rank}.json" for rank in range(processes)]
            self.done[c["name"]] = ([json.loads(file.read_text()) for file in files], out / c["name"])


@pytest.fixture(scope="session")
def odd_world(tmp_path_factory):
    """A model whose first layer is dense and whose LM head is its embedding."""
    return tiny_world.make_world(
        tmp_path_factory.mktemp("odd"), mlp_only_layers=[0], tie_word_embeddings=True
    )


@pytest.fixture(scope="session")
def worlds(one_process, world, odd_world, tmp_path_factory):
    """All worlds by name."""
    folder = tmp_path_factory.mktemp("paired")
    flags = {"pretrained_checkpoint": world.static, "zero_expert_routing": "paired"}
    run = tiny_world.start(world, save=folder, **flags)
    for i, paired in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(paired, seed=i)
    run.save()
    with_heads = replace(world, dynamic=folder)
    return {"plain": world, "odd": odd_world, "paired": with_heads, "paired head": with_heads}


@pytest.fixture(scope="session")
def alone(worlds, tmp_path_factory):
    """The runs in one process: world -> (metrics, final state)."""
    ends = {}
    for name, where in worlds.items():
        folder = tmp_path_factory.mktemp("alone")
        run = tiny_world.start(where, save=folder, **STEPS, **WORLD_FLAGS[name])
        run.run()
        ends[name] = (tiny_world.read_metrics(folder), tiny_world.snapshot(run))
    return ends


@pytest.fixture(scope="session")
def runs(worlds, tmp_path_factory):
    """Results of the cases."""
    halfway = tmp_path_factory.mktemp("halfway")
    tiny_world.start(worlds["plain"], save=halfway, exit_interval=2, **STEPS).run()
    return Runs(worlds, halfway, tmp_path_factory.mktemp("torchrun"))


@pytest.fixture
def results(runs):
    """`results(name)`: of all ranks, none of which failed."""

    def of(name: str) -> list[dict]:
        ranks, _ = runs(name)
        for rank in ranks:
            assert "error" not in rank, rank.get("traceback")
        return [{k: v for k, v in rank.items() if k != "cpu"} for rank in ranks]

    return of


@pytest.fixture
def assert_same_run(runs, results, alone, worlds):
    """Metrics, weights and Adam's moments of a case equal those of one process, to 1e-5."""

    def check(case: dict, first_step: int = 1) -> None:
        assert {rank["iteration"] for rank in results(case["name"])} == {3}
        folder = runs(case["name"])[1]
        metrics, wanted = alone[case["world"]]
        for line, reference in zip(tiny_world.read_metrics(folder), metrics[first_step - 1 :], strict=True):
            assert line.keys() == reference.keys()
            for key in reference:
                pair = [x if isinstance(x, list) else [x] for x in (line[key], reference[key])]
                for a, b in zip(*pair, strict=True):
                    assert a == b or a == pytest.approx(b, abs=1e-5, rel=1e-5), (line["step"], key)
        # One process reads what several wrote: resume under another layout.
        name = case["world"]
        sharded = {key: value for key, value in case["flags"].items() if key == "use_distributed_optimizer"}
        end = tiny_world.start(worlds[name], load=folder, **STEPS, **WORLD_FLAGS[name], **sharded)
        assert end.iteration == 3
        mine = tiny_world.snapshot(end)
        if sharded:  # a snapshot of it lacks the moments; the third step's weights come from them
            wanted = {key: tensor for key, tensor in wanted.items() if key.startswith("/model")}
        assert mine.keys() >= wanted.keys() and (sharded or mine.keys() == wanted.keys())
        assert max((mine[name].float() - wanted[name].float()).abs().max().item() for name in wanted) < 1e-5

    return check
