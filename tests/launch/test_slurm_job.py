"""What a job of launch/slurm does when its training ends in one way or another; srun and scontrol are stand-ins."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
echo "$@" >>"$SEEN/lines"
while [[ $1 == --* ]]; do shift; done
echo "$@" >>"$SEEN/commands"
if [[ $1 == my-server ]]; then
  trap 'echo down >>"$SEEN/servers"; exit 143' TERM
  echo up >>"$SEEN/servers"
  while sleep 0.1; do :; done
fi
[[ $1 != *python ]] || exit "${DOCTOR_CODE:-0}"
echo "$MASTER_ADDR" >"$SEEN/master"
trap 'echo USR1 >>"$SEEN/signals"; echo 5 >"$SAVE/latest_checkpointed_iteration.txt"; exit 75' USR1
trap 'echo TERM >>"$SEEN/signals"; exit 137' TERM
: >"$SEEN/started"
eval "$TRAINING"
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames n[3-4]") printf 'n3\\nn4\\n' ;;
  "show node n3") echo "NodeName=n3 NodeAddr=${ADDRESS-10.0.0.3} NodeHostName=n3" ;;
  requeue*) echo "$2" >>"$SEEN/requeued" ;;
esac
"""
WAIT = "for i in {1..600}; do sleep 0.1; done"


@pytest.fixture
def job(tmp_path):
    """`job(TRAINING, signal=, step=, NAME=value, ...)` runs a job; returns (exit code, its output)."""
    tools, save = tmp_path / "bin", tmp_path / "work" / "stage2"
    tools.mkdir()
    save.mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    paths = (
        f"HF={tmp_path}/hf WORK={tmp_path}/work RECIPE={tmp_path}/recipe PROMPTS={tmp_path}/prompts.jsonl\n"
    )

    (tmp_path / "settings.sh").write_text(paths)

    def run(
        training: str,
        send: signal.Signals | None = None,
        step: str = "stage2",
        settings: str = "",
        **variables: str,
    ):
        if settings:
            (tmp_path / "settings.sh").write_text(f"{paths}{settings}\n")
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SEEN": str(tmp_path),
            "SAVE": str(save),
            "TRAINING": training,
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[3-4]",
        }
        process = subprocess.Popen(
            ["bash", f"launch/slurm/{step}.sbatch", str(tmp_path / "settings.sh")],
            cwd=ROOT,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if send:
            while not (tmp_path / "started").exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            process.send_signal(send)
        return process.wait(120), process.stdout.read()

    run.save, run.seen = (
        save,
        lambda name: ((tmp_path / name).read_text().split() if (tmp_path / name).exists() else []),
    )
    return run


def test_a_finished_training_ends_the_job(job):
    code, said = job("exit 0")
    assert (code, job.seen("requeued")) == (0, []), said


def test_the_time_limits_signal_reaches_the_training_whose_save_is_waited_for(job):
    code, said = job(WAIT, send=signal.SIGUSR1)
    assert job.seen("signals") == ["USR1"] and job.seen("requeued") == ["41"], said
    assert code == 75 and "requeued because of the time limit; saved: 5" in said


def test_a_task_of_an_array_requeues_itself_alone(job):
    """The array's last task has the id of the array as its SLURM_JOB_ID."""
    variables = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3", "SHARDS": "4"}
    job(WAIT, send=signal.SIGUSR1, step="stage0", **variables)
    assert job.seen("requeued") == ["41_3"]


@pytest.mark.parametrize(("code", "send"), [("0", None), ("2", None), ("", signal.SIGUSR1)])
def test_servers_run_on_every_node_beside_the_one_who_asks_and_end_with_the_job(job, code, send):
    servers = "SERVER=(my-server --port 9000) SERVER_PORT=9000 STAGE0_NODES=2 GPUS_PER_NODE=8"
    wait = 'until [[ -e "$SEEN/servers" ]]; do sleep 0.1; done; '
    ended, said = job(f"{wait} {f'exit {code}' if code else WAIT}", send, "stage0", servers)
    assert ended == (75 if send else int(code)), said
    assert job.seen("servers") == ["up", "down"]
    lines = [line for line in (Path(job.save).parents[1] / "lines").read_text().splitlines() if line]
    server, client = (
        next(line for line in lines if word in line) for word in ("my-server", "--rollout-engine")
    )
    assert (
        "--nodes=2 --ntasks=2 --ntasks-per-node=1" in server and "--overlap my-server --port 9000" in server
    )
    assert "--nodes=1 --ntasks=1" in client and "--overlap --gres=none" in client
    assert "--rollout-url http://10.0.0.3:9000/v1 http://n4:9000/v1 --rollout-wait 3600" in client
    assert "--pretrained-checkpoint" not in client and "--hf-config" in client


def test_a_cancelled_job_saves_and_does_not_come_back(job):
    code, said = job(WAIT, send=signal.SIGTERM)
    assert job.seen("signals") == ["USR1"]  # srun would answer SIGTERM with SIGKILL
    assert (code, job.seen("requeued")) == (75, []), said


def test_a_training_that_was_told_to_stop_by_hand_does_not_come_back(job):
    code, _ = job("exit 75")
    assert (code, job.seen("requeued")) == (75, [])


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_is_not_tried_again(job, code):
    assert job(f"exit {code}")[0] == code
    assert job.seen("requeued") == []


@pytest.mark.parametrize("code", [3, 137, 134])
def test_a_lost_process_starts_the_job_again(job, code):
    job(f"exit {code}")
    assert job.seen("requeued") == ["41"]


@pytest.mark.parametrize(("saved_now", "again"), [(7, ["41"]), (5, [])])
def test_a_job_that_gets_no_further_is_not_started_for_ever(job, saved_now, again):
    tracker = job.save / "latest_checkpointed_iteration.txt"
    tracker.write_text("5\n")
    code, said = job(f'echo {saved_now} >"{tracker}"; exit 3', SLURM_RESTART_COUNT="2")
    assert job.seen("requeued") == again
    assert again or (code == 1 and "nothing was saved since the last start (still 5)" in said)


def test_restarts_are_counted(job):
    tracker = job.save / "latest_checkpointed_iteration.txt"
    code, said = job(f'echo 9 >"{tracker}"; exit 3', SLURM_RESTART_COUNT="4", MAX_RESTARTS="4")
    assert (code, job.seen("requeued")) == (1, []) and "MAX_RESTARTS" in said


def test_a_training_that_hangs_is_ended_and_started_again(job):
    code, said = job(WAIT, HANG_MINUTES="0", WATCH_SECONDS="1.2")
    assert job.seen("signals") == ["TERM"] and job.seen("requeued") == ["41"], said
    assert code == 75 and "has not grown for 0 minutes" in said


def test_a_training_that_works_is_not_taken_for_one_that_hangs(job):
    line = 'for i in {1..30}; do echo "$i" >>"$SAVE/metrics.jsonl"; sleep 0.1; done; exit 0'
    code, said = job(line, HANG_MINUTES="0", WATCH_SECONDS="1.2")
    assert code == 0 and job.seen("signals") == [], said


def test_on_a_sick_node_nothing_is_started(job):
    code, said = job("exit 0", DOCTOR_CODE="2")
    assert code == 2 and "health check failed (2)" in said
    assert not job.seen("started") and job.seen("master") == []


def test_the_nodes_meet_at_the_address_that_slurm_uses(job):
    job("exit 0")
    assert job.seen("master") == ["10.0.0.3"]
    job("exit 0", ADDRESS="")
    assert job.seen("master") == ["n3"]


def test_what_is_missing_is_named(job, tmp_path):
    (tmp_path / "settings.sh").write_text(f"WORK={tmp_path}/work\n")
    code, said = job("exit 0")
    assert code != 0 and "HF: is missing in the settings" in said and said.count("\n") == 1


def test_nothing_is_ended_by_name():
    text = "".join(file.read_text() for file in (ROOT / "launch" / "slurm").iterdir())
    assert not any(word in text for word in ("pkill", "killall", "skill"))
