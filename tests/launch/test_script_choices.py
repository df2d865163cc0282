"""Which command launch/pretrain_zeda.sh runs, seen by a stand-in for Python; no training."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain_zeda.sh"
SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS")


def executable(file: Path, text: str) -> Path:
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(0o755)
    return file


@pytest.fixture
def launch(tmp_path):
    """Runs the script with `variables` only; returns (exit code, arguments of Python, its variables, stderr)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "grep", "tr", "wc"):
        (tools / name).symlink_to(shutil.which(name))
    show = "".join(f'echo "{name}=${{{name}-unset}}"; ' for name in (*SHOWN, "PYTHONPATH"))
    python = executable(tmp_path / "python", f'for word in "$@"; do echo "$word"; done; {show} exit 7\n')

    def run(*arguments: str, **variables: str):
        done = subprocess.run(
            [tools / "bash", SCRIPT, *arguments],
            cwd=tmp_path,
            env={"PATH": str(tools), "PYTHON": str(python)} | variables,
            capture_output=True,
            text=True,
        )
        lines = done.stdout.splitlines()
        count = len(lines) - len(SHOWN) - 1
        return done.returncode, lines[:count], dict(line.split("=", 1) for line in lines[count:]), done.stderr

    run.tools = tools
    return run


def test_the_script_is_valid_for_bash_and_for_python():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")
    assert os.access(SCRIPT, os.X_OK)


def test_nothing_is_ended_by_name():
    text = SCRIPT.read_text() + (ROOT / "launch" / "env.sh").read_text()
    assert not any(word in text for word in ("pkill", "killall", "kill "))


def test_one_process_runs_python_directly_and_keeps_its_exit_code(launch):
    code, arguments, variables, _ = launch(
        "--config", "a b.yaml", RANK="3", WORLD_SIZE="8", MASTER_ADDR="far"
    )
    assert code == 7
    assert arguments == ["-u", str(SCRIPT), "--config", "a b.yaml"]
    # Cluster operators number nodes with RANK; one process is a world of its own.
    assert [variables[name] for name in SHOWN[:5]] == ["unset"] * 5


def test_variables_of_env_sh_are_defaults_and_the_checkout_comes_first(launch):
    _, _, variables, _ = launch(PYTHONPATH="/other", CUDA_DEVICE_MAX_CONNECTIONS="32")
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert variables["PYTHONPATH"] == f"{ROOT}:/other"
    assert launch()[2]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"NPROC_PER_NODE": "4"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC_PER_NODE": "3"}, "3"),
    ],
)
def test_one_node_is_standalone_with_one_process_per_gpu(launch, variables, processes):
    _, arguments, _, _ = launch("--lr", "1", **variables)
    start = ["-u", "-m", "zeda_megatron.runtime.elastic", "--standalone", "--nproc-per-node", processes]
    assert arguments == [*start, str(SCRIPT), "--lr", "1"]


def test_gpus_are_counted_by_nvidia_smi(launch):
    cards = "GPU 0: H100\n  MIG 1g.10gb Device 0: (UUID)\nGPU 1: H100\n"
    executable(launch.tools / "nvidia-smi", f"printf '{cards}'\n")
    _, arguments, _, _ = launch()
    assert arguments[arguments.index("--nproc-per-node") + 1] == "2"


def test_several_nodes_meet_at_the_master(launch):
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "NPROC_PER_NODE": "1"}
    _, arguments, _, _ = launch(**place)
    text = " ".join(arguments)
    assert "--nnodes 2 --node-rank 1 --master-addr host0 --master-port 29500 --nproc-per-node 1" in text


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_nodes_need_to_know_where(launch, missing):
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    del place[missing]
    code, arguments, _, errors = launch(**place)
    assert code not in (0, 7) and not arguments
    assert errors.count("\n") == 1 and f"{missing}: is missing" in errors


def test_tasks_of_srun_on_several_nodes_meet_at_the_first_host(launch):
    executable(launch.tools / "scontrol", '[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}
    job = {"SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0"}
    code, arguments, variables, errors = launch("--lr", "1", **slurm, **job)
    assert code == 7, errors
    assert arguments == ["-u", str(SCRIPT), "--lr", "1"]
    assert [variables[name] for name in SHOWN[:4]] == ["9", "16", "1", "n3"]
    assert 15000 <= int(variables["MASTER_PORT"]) < 30000


def test_without_scontrol_the_master_must_be_named(launch):
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
    code, _, _, errors = launch(**slurm, SLURM_JOB_NODELIST="n[3-4]")
    assert code == 2 and errors.splitlines()[-1].startswith("error: ") and "MASTER_ADDR" in errors
    code, _, variables, _ = launch(**slurm, SLURM_JOB_NODELIST="n[3-4]", MASTER_ADDR="n3")
    assert code == 7 and variables["MASTER_ADDR"] == "n3"


def test_the_script_given_to_sbatch_is_no_task_of_srun(launch):
    """It sees SLURM_PROCID=0 and the job's SLURM_NTASKS, and would wait for tasks that nobody starts."""
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}
    _, arguments, variables, _ = launch(**batch, NPROC_PER_NODE="8")
    assert "--standalone" in arguments and variables["RANK"] == "unset"
    _, arguments, variables, _ = launch(**batch, NPROC_PER_NODE="8", SLURM_STEP_ID="0")
    assert arguments == ["-u", str(SCRIPT)] and variables["WORLD_SIZE"] == "8"


def test_one_task_a_node_starts_all_processes_of_its_node(launch):
    two = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
    }
    two |= {"MASTER_ADDR": "n1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    for more in ({"NPROC_PER_NODE": "8"}, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}):
        _, arguments, variables, errors = launch("--lr", "1", **two, **more)
        told = dict(zip(arguments, arguments[1:]))
        assert told["--nproc-per-node"] == "8", errors
        assert [told[f"--{name}"] for name in ("nnodes", "node-rank", "master-addr")] == ["2", "1", "n1"]
        assert 15000 <= int(told["--master-port"]) < 30000 and variables["RANK"] == "unset"
    # one process a task was asked for, or nothing else is there
    for more in ({"NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {}):
        _, arguments, variables, _ = launch(**two, **more)
        assert arguments == ["-u", str(SCRIPT)] and variables["WORLD_SIZE"] == "2"


def test_tasks_and_processes_that_do_not_fit_are_refused(launch):
    tasks = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
    }
    code, _, _, errors = launch(**tasks, NPROC_PER_NODE="8", MASTER_ADDR="n1")
    assert code == 2 and "NPROC_PER_NODE=8" in errors and len(errors.splitlines()) == 1
    assert launch(**tasks, NPROC_PER_NODE="2", MASTER_ADDR="n1")[2]["WORLD_SIZE"] == "4"


def test_a_job_of_several_nodes_is_not_started_on_the_first_alone(launch):
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "ENVIRONMENT": "BATCH"}
    code, _, _, errors = launch(**batch, SLURM_NNODES="2")
    assert code == 2 and "srun" in errors and len(errors.splitlines()) == 1
    assert launch(**batch, NNODES="1")[0] == 7
    assert launch(**batch, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NUM_NODES="1", SLURM_STEP_ID="0")[0] == 7


def test_a_single_task_is_a_node_like_any_other(launch):
    """`srun --pty bash` on a node with GPUs, and a step of one task in a job of several."""
    one = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert launch(**one)[1] == ["-u", str(SCRIPT)]
    assert "--standalone" in launch(**one, CUDA_VISIBLE_DEVICES="0,1")[1]


def test_help_is_printed_once(launch):
    _, arguments, _, _ = launch("--help", NPROC_PER_NODE="8")
    assert arguments == ["-u", str(SCRIPT), "--help"]
