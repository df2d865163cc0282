"""launch/pretrain_zeda.sh starts training in every way that its head names."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain_zeda.sh"
FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ZEDA_ENV",
    "PYTHONPATH",
    "ENVIRONMENT",
)


@pytest.fixture(scope="module")
def config(world, tmp_path_factory) -> Path:
    """A YAML file: three steps of stage 1 on the tiny world."""
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(
        "stage: 1\n"
        f"pretrained_checkpoint: {world.dynamic}\n"
        f"data_path: {world.rollouts}\n"
        "seq_length: 128\n"
        "global_batch_size: 2\n"
        "train_iters: 3\n"
        "progress: false\n"
    )
    return file


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """This process' environment without what a launcher has set; `python` and `torchrun` are this Python's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in FOREIGN and not name.startswith(("SLURM_", "TORCHELASTIC_", "PET_"))
    }
    bin_folder = str(Path(sys.executable).parent)
    return kept | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "PET_MASTER_PORT": str(free_port()),  # torchrun's default is 29500 for everybody on this machine
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SLOW_ALONE = [pytest.param(1, marks=pytest.mark.slow), 2]
"""Numbers of processes, where what is promised is most at risk with several."""


def train(command: list, cwd: Path, environment: dict[str, str], **more: str) -> subprocess.CompletedProcess:
    """Run to the end from another folder than the checkout."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=240,
    )


def steps(save: Path) -> list[int]:
    file = save / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.parametrize("processes", SLOW_ALONE)
def test_the_literal_torchrun_command_trains(config, tmp_path, environment, processes):
    command = ["torchrun", "--nproc-per-node", processes, SCRIPT, "--config", config]
    done = train([*command, "--save", tmp_path / "run"], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_flags_win_over_yaml_and_one_task_of_srun_needs_no_torchrun(config, tmp_path, environment):
    command = [
        "bash",
        SCRIPT,
        "--config",
        config,
        "--save",
        tmp_path / "run",
        "--train-iters",
        "2",
    ]
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    done = train(command, tmp_path, environment, **slurm)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "run") == [1, 2]


def test_two_tasks_of_srun_find_each_other(config, tmp_path, environment):
    command = ["bash", str(SCRIPT), "--config", str(config), "--save", str(tmp_path / "run")]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment | slurm | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    errors = [task.communicate(timeout=240)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert steps(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        pytest.param(1, signal.SIGTERM, id="1-SIGTERM", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, id="2-Ctrl-C"),
        pytest.param(1, signal.SIGINT, id="1-Ctrl-C", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, id="2-SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_bash_process_saves_and_exits_0(config, tmp_path, environment, processes, number):
    save = tmp_path / "run"
    command = ["bash", SCRIPT, "--config", config, "--save", save, "--train-iters", "1000000"]
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env=environment | {"NPROC_PER_NODE": str(processes)},
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        while not steps(save) and run.poll() is None:
            time.sleep(0.2)
        run.send_signal(number)
        errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    last = steps(save)[-1]
    assert (save / f"iter_{last:07d}").is_dir()
    assert f"stopped at step {last} on request; saved step {last}" in errors


def test_a_second_ctrl_c_ends_at_once(config, tmp_path, environment):
    save = tmp_path / "run"
    command = ["bash", SCRIPT, "--config", config, "--save", save, "--train-iters", "1000000"]
    # The first step is held up: no end of a step comes.
    hold = tmp_path / "sitecustomize.py"
    hold.write_text(
        "import threading, time, sys\n"
        "def hold():\n"
        "    while 'zeda_megatron.training.step' not in sys.modules: time.sleep(0.01)\n"
        "    step = sys.modules['zeda_megatron.training.step']\n"
        "    while not hasattr(step, 'Stepper'): time.sleep(0.01)\n"
        "    step.Stepper.step = lambda *a: (print('held', file=sys.stderr, flush=True), time.sleep(600))\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
    )
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        said = ""
        while "held" not in said:
            line = run.stderr.readline()
            assert line, said
            said += line
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            time.sleep(1)
        said += run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "Traceback" not in said
    assert said.count("Ctrl-C again: at once") == 1 and "interrupted: what was not saved is lost" in said


def test_ranks_end_soon_after_their_launcher_was_killed(config, tmp_path, environment):
    save = tmp_path / "run"
    command = ["bash", SCRIPT, "--config", config, "--save", save, "--train-iters", "1000000"]
    run = subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env=environment | {"NPROC_PER_NODE": "2"},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not steps(save) and run.poll() is None:
            time.sleep(0.2)
        ranks = [p for p in psutil.Process(run.pid).children() if "pretrain_zeda" in " ".join(p.cmdline())]
        assert len(ranks) == 2
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGUSR1, signal.SIGTERM], id="SIGUSR1 and SIGTERM"),
        pytest.param([signal.SIGINT], id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param([signal.SIGUSR1], id="SIGUSR1", marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_process_group_saves_too(config, tmp_path, environment, numbers):
    """Slurm signals all processes of a task, Megatron's helpers of saves in the background among them."""
    save = tmp_path / "run"
    command = [
        "bash",
        SCRIPT,
        "--config",
        config,
        "--save",
        save,
        "--train-iters",
        "1000000",
        "--save-interval",
        "1",
        "--async-save",
    ]
    with open(tmp_path / "errors", "w+") as errors:
        run = subprocess.Popen(
            [str(part) for part in command],
            cwd=tmp_path,
            env=environment,
            stderr=errors,
            start_new_session=True,
        )
        while not (save / "iter_0000001").exists() and run.poll() is None:
            time.sleep(0.1)
        for number in numbers:
            os.killpg(run.pid, number)
        code = run.wait(120)
        errors.seek(0)
        said = errors.read()
    assert code == 0, said
    last = steps(save)[-1]
    assert f"stopped at step {last} on request; saved step {last}" in said
    assert (save / f"iter_{last:07d}").is_dir()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path, environment, processes):
    (tmp_path / "run.yaml").write_text("train_itres: 3\n")
    done = train(
        ["bash", SCRIPT, "--config", "run.yaml"], tmp_path, environment, NPROC_PER_NODE=str(processes)
    )
    assert done.returncode == 2
    assert done.stderr == "error: run.yaml: unknown key 'train_itres'; did you mean 'train_iters'?\n"


def test_under_torchrun_its_report_ends_with_the_user_error(tmp_path, environment):
    done = train(["torchrun", "--nproc-per-node", 1, SCRIPT, "--lr", "fast"], tmp_path, environment)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "argument --lr: invalid float value: 'fast'" in line]
    assert said[0].startswith("error: ")
    assert said[-1] in done.stderr.splitlines()[-2]
    assert 'pretrain_zeda.sh", line' not in done.stderr  # the traceback is torchrun's own, none is ours


def test_two_runs_on_one_folder_the_second_stops_and_after_kill_9_a_third_takes_over(
    config, tmp_path, environment
):
    save = tmp_path / "run"
    command = ["bash", SCRIPT, "--config", config, "--save", save, "--save-interval", "1"]
    with open(tmp_path / "errors", "w") as errors:
        first = subprocess.Popen(
            [str(part) for part in [*command, "--train-iters", "1000000"]],
            cwd=tmp_path,
            env=environment,
            stderr=errors,
        )
    try:
        while not (save / "iter_0000002").exists() and first.poll() is None:
            time.sleep(0.1)
        done = train(command, tmp_path, environment)
        assert first.poll() is None, (tmp_path / "errors").read_text()
    finally:
        first.kill()
        first.wait()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: --save {save}/.zeda.lock: process {first.pid} on " in done.stderr
    third = train(
        [*command, "--train-iters", steps(save)[-1] + 2, "--lr-decay-style", "constant"],
        tmp_path,
        environment,
    )
    assert third.returncode == 0, third.stderr
    assert (
        f"taken over from process {first.pid} on " in third.stderr and "that process is gone" in third.stderr
    )
    assert not (save / ".zeda.lock").exists()
    assert steps(save) == list(range(1, steps(save)[-1] + 1))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_can_be_told_from_a_finished_one(config, tmp_path, environment, processes):
    command = ["bash", SCRIPT, "--config", config, "--save", tmp_path / "run", "--stopped-exit-code", "75"]
    more = {"NPROC_PER_NODE": str(processes)}
    stopped = train([*command, "--exit-interval", "2"], tmp_path, environment, **more)
    assert (stopped.returncode, steps(tmp_path / "run")) == (75, [1, 2]), stopped.stderr
    assert "Traceback" not in stopped.stderr and "Root Cause" not in stopped.stderr
    assert train(command, tmp_path, environment).returncode == 0
    assert steps(tmp_path / "run") == [1, 2, 3]
