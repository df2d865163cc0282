# The common part of the jobs here, sourced by each *.sbatch: settings, health check, signals, time-outs, requeueing.
#
# What ends a stage, and what follows:
#   exit code 0                         the work is done; jobs that wait for it start
#   SIGUSR1 from Slurm (time limit)     goes on to the training, which saves and exits 75: the job is requeued
#   exit code 3, a crash, a hang        the job is requeued and goes on from its last checkpoint
#   exit code 2, 1                      a mistake, a defect: the job fails, the jobs that wait for it are removed
#   scancel --signal=TERM JOB           the training saves, the job fails with 75: nothing goes on by itself
# A job is not requeued if it has not got further since it was last started, nor more than MAX_RESTARTS times.

set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
say() { echo "$(date '+%F %T') $*"; }

[[ -f launch/slurm/job.sh ]] || fail "submit from the top of the repository (here is $PWD)"
settings=${1:?is missing: sbatch launch/slurm/STEP.sbatch SETTINGS.sh}
[[ -f $settings ]] || fail "$settings: no such file"
source launch/env.sh
[[ $settings == */* ]] || settings=./$settings # `source` would look on PATH first
source "$settings"
: "${HF:?is missing in the settings: the Hugging Face folder}"
: "${WORK:?is missing in the settings: the folder of all results}"
: "${RECIPE:?is missing in the settings: the folder of stage0.yaml, stage1.yaml, stage2.yaml}"
: "${NODES:=1}" "${GPUS_PER_NODE:=0}" "${SHARDS:=1}" "${STAGE0_NODES:=1}" "${SEED:=1234}" "${STAGE2:=1}"
: "${STAGE1:=1}" "${TASKS_PER_NODE:=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}" "${HANG_MINUTES:=60}" "${MAX_RESTARTS:=50}"
: "${SERVER_PORT:=8000}" "${SERVER_START_SECONDS:=3600}"
: "${PYTHON:=python}" "${CONTAINER:=}" "${CPUS_PER_TASK:=}" "${WATCH_SECONDS:=20}"
for name in ROLLOUTS CONTAINER_MOUNTS PLAN SERVER {CONVERT,STAGE0,FIT,STAGE1,STAGE2,EXPORT,EVALUATE}_FLAGS; do
  declare -p "$name" &>/dev/null || declare -a "$name=()"
done
export PYTHON NPROC_PER_NODE=1 # a task of srun is one process
# What stages 1 and 2 begin from, and what is made in the end. Shared zero experts come with the conversion.
begin=$WORK/fitted
[[ " ${CONVERT_FLAGS[*]} " != *" --num-zero-experts "* ]] || begin=$WORK/start
made=$begin
((!STAGE1)) || made=$WORK/stage$((STAGE2 ? 2 : 1))
restarts=${SLURM_RESTART_COUNT:-0}
# The id of an array's last task is that of the array: `scontrol requeue` would take all of them.
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
me=${me:-${SLURM_JOB_ID:-0}}
child='' heard='' asked='' hung='' healthy=''
overlap=() # options of steps that share the job's machines with another

trap 'heard=1 asked=USR1; pass_on USR1' USR1 # the time limit is near
trap 'heard=1 asked=TERM; pass_on USR1' TERM # the job is being cancelled; srun would answer SIGTERM with SIGKILL
trap 'heard=1 hung=1; pass_on TERM' USR2     # from the watchdog below

pass_on() {
  say "signal: $1 to what runs" >&2
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

run() { # in the background, so that signals are heard meanwhile; sets rc
  rc=0
  if [[ -n ${ZEDA_DRY_RUN:-} ]]; then
    printf '    %s\n' "$(quoted "$@")"
    return
  fi
  "$@" &
  child=$!
  while true; do
    heard='' rc=0
    wait "$child" || rc=$?
    [[ -n $heard ]] || break
  done
  child=''
}

quoted() { # words as one would type them
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+@%#-]+$ ]] || printf -v word %q "$word"
    line+=("$word")
  done
  echo "${line[*]}"
}

step() { # nodes, tasks per node: the words that begin a step of this job, in the container if there is one, into `line`
  local nodes=$1 tasks=$2 mounts
  # GPUs come from the job. A process that ends ends the others after a minute: time to tidy up, none to hang.
  line=(srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" --kill-on-bad-exit=0 --wait=60)
  line+=("${overlap[@]}")
  [[ -z $CPUS_PER_TASK ]] || line+=(--cpus-per-task="$CPUS_PER_TASK")
  if [[ -n $CONTAINER ]]; then
    local folder folders=("$PWD" "$WORK" "$HF" "${CONTAINER_MOUNTS[@]}")
    for folder in "${PROMPTS:-}" "${HELDOUT:-}" "${ROLLOUTS[@]}"; do folders+=("${folder%/*}"); done
    mounts=$(for folder in "${folders[@]}"; do [[ $folder != /* ]] || echo "$folder:$folder"; done | sort -u | paste -s -d ,)
    if [[ $CONTAINER == *.sif ]]; then
      line+=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
    else
      line+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
    fi
  fi
}

srun_here() { # nodes, tasks per node, command
  local line
  step "$1" "$2"
  run "${line[@]}" "${@:3}"
}

serve() { # nodes, port, log, command: the same server on every node, in a step that ends with the job; sets `urls`
  local nodes=$1 port=$2 log=$3 line hosts host
  shift 3
  health "$nodes"
  overlap=(--overlap)
  step "$nodes" 1
  if [[ -n ${ZEDA_DRY_RUN:-} ]]; then
    printf '    %s &\n' "$(quoted "${line[@]}" "$@")"
    urls=("http://NODE:$port/v1")
  else
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is missing: start with sbatch}")
    urls=()
    for host in $hosts; do urls+=("http://$(address "$host"):$port/v1"); done
    mkdir -p "${log%/*}"
    "${line[@]}" "$@" >>"$log" 2>&1 &
    servers=$!
    # Slurm ends what a step has started with the step.
    trap 'kill -s TERM "$servers" 2>/dev/null; wait "$servers" || true' EXIT
  fi
  # Who asks them needs no GPU, and must not take memory of one.
  ((GPUS_PER_NODE == 0)) || overlap+=(--gres=none)
  GPUS_PER_NODE=0 TASKS_PER_NODE=1
}

answers() { # what stage 0 writes is ROLLOUTS, unless the settings name others
  local i
  ((${#ROLLOUTS[@]})) || for ((i = 0; i < SHARDS; i++)); do ROLLOUTS+=("$WORK/rollouts/shard-$i-of-$SHARDS.jsonl"); done
}

one_task() { # command: must succeed
  srun_here 1 1 "$@"
  ((rc == 0)) || exit "$rc"
}

meet() { # where the processes of several nodes find one another: the first node
  local hosts first
  [[ -z ${ZEDA_DRY_RUN:-} ]] || return 0
  hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is missing: start with sbatch}")
  read -r first <<<"$hosts"
  MASTER_ADDR=$(address "$first")
  export MASTER_ADDR
}

address() { # node: where Slurm finds it, else its name
  local found
  found=$(scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*' || true)
  found=${found#NodeAddr=}
  echo "${found:-$1}"
}

health() { # nodes: every one has the packages, sees its GPUs and can write; asked once a job
  [[ -z $healthy ]] || return 0
  healthy=1
  srun_here "$1" 1 "$PYTHON" -m zeda_megatron doctor --brief --expect-gpus "$GPUS_PER_NODE" --writable "$WORK"
  ((rc == 0)) || [[ -n $asked ]] ||
    fail "health check failed ($rc): the lines above name the node; mend it, or leave it out (--exclude in SBATCH_FLAGS)"
}

train() { # nodes, file that grows with every step, file that tells what is saved, flags of launch/pretrain_zeda.sh
  local nodes=$1 steps=$2 saved=$3 before watchdog=''
  shift 3
  meet
  health "$nodes"
  before=$(state_of "$saved" content)
  if [[ -z ${ZEDA_DRY_RUN:-} ]]; then
    say "job $me, start $((restarts + 1)), on ${SLURM_JOB_NODELIST}; saved so far: ${before:-nothing}"
    watch "$steps" &
    watchdog=$!
  fi
  rc=75
  [[ -n $asked ]] ||
    srun_here "$nodes" "$TASKS_PER_NODE" bash launch/pretrain_zeda.sh "$@" --no-progress --stopped-exit-code 75
  [[ -z $watchdog ]] || kill "$watchdog" 2>/dev/null || true
  [[ -z ${ZEDA_DRY_RUN:-} ]] || return 0
  say "training ended with exit code $rc"
  case $rc in
    0) [[ $asked != TERM ]] || exit 75 && return ;;
    2) exit 2 ;; # a mistake, told above; it would not go away
  esac
  if [[ $asked == TERM ]]; then
    exit "$rc"
  elif [[ $hung ]]; then
    again "no step within $HANG_MINUTES minutes" "$before" "$saved"
  elif [[ $asked == USR1 ]]; then
    again "the time limit" "$before" "$saved"
  elif ((rc == 3 || rc > 128)); then
    again "exit code $rc" "$before" "$saved"
  fi
  exit "$rc"
}

state_of() { # file, content or time
  if [[ ! -e $1 ]]; then
    echo
  elif [[ $2 == content && $1 == *.txt ]]; then
    cat "$1"
  elif [[ $2 == content ]]; then
    stat -c %s "$1"
  else
    stat -c '%s %Y' "$1"
  fi
}

watch() { # file: SIGUSR2 to this job if it does not change for HANG_MINUTES
  local seen='' now last=$SECONDS
  trap - USR1 USR2
  trap 'kill $! 2>/dev/null; exit' TERM # no sleep stays behind
  while sleep "$WATCH_SECONDS" & wait $!; do
    now=$(state_of "$1" time)
    if [[ $now != "$seen" ]]; then
      seen=$now last=$SECONDS
    elif ((SECONDS - last > HANG_MINUTES * 60)); then
      say "hang: $1 has not grown for $HANG_MINUTES minutes" >&2
      kill -s USR2 $$
      return
    fi
  done
}

again() { # why, what was saved before, file that tells what is saved now: back into the queue
  local now
  now=$(state_of "$3" content)
  if [[ $now == "$2" ]] && ((restarts > 0)); then
    echo "error: not requeued because of $1: nothing was saved since the last start (still ${now:-nothing}); raise the" \
      "time limit or HANG_MINUTES, save more often, or see the lines above" >&2
    exit 1
  elif ((restarts >= MAX_RESTARTS)); then
    echo "error: not requeued after $restarts restarts (MAX_RESTARTS)" >&2
    exit 1
  fi
  say "requeued because of $1; saved: ${now:-nothing}"
  scontrol requeue "$me"
  exit 75
}
