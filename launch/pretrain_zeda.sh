#!/usr/bin/env bash
""":"
# Trains. One file, two readers: bash runs the first half, Python (started by torchrun) the second.
#
#   torchrun --nproc-per-node 8 launch/pretrain_zeda.sh --config FILE.yaml [--flag value ...]
#   bash launch/pretrain_zeda.sh --config FILE.yaml [--flag value ...]        one node: all GPUs, or one CPU process
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash launch/pretrain_zeda.sh ...   on each node with its own rank
#   srun bash launch/pretrain_zeda.sh ...                                     several Slurm tasks: one process each;
#                                                                             one task a node: all GPUs of the node
#
# Environment: NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON; more in launch/env.sh.
# SIGTERM and SIGUSR1 make the run save and exit 0. Exit code: that of the training, 2 for a wrong option or file.
# (Started by torchrun itself, torchrun adds its own report to an error, exits 1, and kills after 30 seconds.)

set -euo pipefail
script=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/pretrain_zeda.sh
source "${script%/*}/env.sh"
python=${PYTHON:-$(command -v python || command -v python3)} || { echo "error: no python on PATH; set PYTHON" >&2; exit 2; }

alone() { # the only process: no launcher in between, no rendezvous
  unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
  exec "$python" -u "$script" "$@"
}

gpus() { # GPUs that this process may use
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' ' ' <<<"$CUDA_VISIBLE_DEVICES" | wc -w
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

one_of_many() { # a task of srun; the script given to sbatch sees the same variables, but no step of srun
  [[ -n ${SLURM_PROCID:-} && ${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}} -gt 1 ]] &&
    [[ ${ENVIRONMENT:-} != BATCH || -n ${SLURM_STEP_ID:-} ]]
}

meet_in_slurm() { # where the tasks of a step meet: the first of its nodes
  local nodes=$1 hosts
  if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=127.0.0.1
    if ((nodes > 1)); then
      hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:?is missing}}") || {
        echo "error: scontrol cannot list the hosts here; set MASTER_ADDR to the host of task 0" >&2
        exit 2
      }
      read -r MASTER_ADDR <<<"$hosts"
    fi
  fi
  # Every task computes the same port; two jobs or steps on one host rarely share it.
  local job=${SLURM_JOB_ID:-0} step=${SLURM_STEP_ID:-0}
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((15000 + (job * 7 + step) % 15000))}
}

from_slurm() { # each task is one process, or, where there is one task a node, one node with a torchrun of its own
  local tasks=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS} nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
  local wanted=${NPROC_PER_NODE:-1}
  if ((tasks == nodes)) && [[ -z ${NPROC_PER_NODE:-} ]]; then wanted=$(gpus); fi
  if ((wanted > 1 && tasks == nodes)); then
    meet_in_slurm "$nodes"
    NNODES=$nodes NODE_RANK=$SLURM_PROCID
    by_torchrun "$wanted" "$@"
  elif ((wanted > 1 && wanted * nodes != tasks)); then
    echo "error: NPROC_PER_NODE=$wanted, but srun starts $tasks tasks on $nodes nodes: start one task a node" \
      "(--ntasks-per-node=1), or one a process (--ntasks-per-node=$wanted)" >&2
    exit 2
  fi
  export RANK=$SLURM_PROCID WORLD_SIZE=$tasks LOCAL_RANK=${SLURM_LOCALID:?is missing: start with srun}
  meet_in_slurm "$nodes"
  exec "$python" -u "$script" "$@"
}

by_torchrun() { # one node: --standalone finds a free port; several: the caller says where and which
  local nodes=${NNODES:-1} place=(--standalone)
  if ((nodes > 1)); then
    place=(--nnodes "$nodes" --node-rank "${NODE_RANK:?is missing: 0 on the first node, 1 on the next, ...}"
      --master-addr "${MASTER_ADDR:?is missing: the host name of node 0}" --master-port "${MASTER_PORT:-29500}")
  fi
  unset RANK WORLD_SIZE LOCAL_RANK
  exec "$python" -u -m zeda_megatron.runtime.elastic "${place[@]}" --nproc-per-node "$1" "$script" "${@:2}"
}

start() {
  local processes=${NPROC_PER_NODE:-}
  if [[ -n ${TORCHELASTIC_RUN_ID:-} && -n ${LOCAL_RANK:-} ]]; then
    exec "$python" -u "$script" "$@" # torchrun --no-python
  elif one_of_many; then
    from_slurm "$@"
  fi
  local nodes=${SLURM_STEP_NUM_NODES:-${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}}
  if ((nodes > 1)) && [[ -z ${NNODES:-} ]]; then
    echo "error: this job has $nodes nodes, and nothing starts the others: srun --ntasks-per-node=1 bash $script ..." \
      "(NNODES=1 uses this node alone)" >&2
    exit 2
  fi
  [[ -n $processes ]] || processes=$(gpus)
  ((processes > 0)) || processes=1
  if ((processes == 1 && ${NNODES:-1} == 1)) || [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    alone "$@"
  fi
  by_torchrun "$processes" "$@"
}

start "$@"
exit
: <<'# end of the Python half'
":"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_environment() -> None:
    """launch/env.sh, where torchrun came here without passing through bash."""
    if os.environ.get("ZEDA_ENV") == "1":
        return
    shell = ["bash", "-c", 'source "$1" && env -0', "bash", str(ROOT / "launch" / "env.sh")]
    lines = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.split("\0")
    os.environ.update(line.split("=", 1) for line in lines if "=" in line)


def start() -> None:
    """Run one training process."""
    read_environment()
    if (ROOT / "zeda_megatron").is_dir():
        sys.path[0] = str(ROOT)
    missing = [name for name in ("torch", "megatron", "transformers", "yaml") if find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}: activate your environment, or "
              f"`pip install -e {ROOT}` into it (PYTHON=... chooses another Python)", file=sys.stderr)
        sys.exit(2)
    from zeda_megatron.__main__ import train, training_options
    from zeda_megatron.runtime.worker import run_worker

    run_worker(lambda: train(training_options(sys.argv[1:])))


if __name__ == "__main__":
    start()
elif __name__ == "__mp_main__":  # a child that writes a checkpoint
    from zeda_megatron.runtime.worker import leave_with_parent

    leave_with_parent()
# end of the Python half
