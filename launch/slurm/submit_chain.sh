#!/usr/bin/env bash
# Submits convert -> stage 0 (an array) -> fit -> stage 1 -> stage 2 -> export -> evaluate, each after the one before.
#
#   bash launch/slurm/submit_chain.sh SETTINGS.sh [--dry-run] [--from STEP] [--to STEP] [--shards LIST]
#
#   --dry-run       prints every sbatch command, and under it what its job will run; submits nothing
#   --from, --to    only these steps: convert, stage0, fit, stage1, stage2, export, evaluate
#   --shards LIST   of stage 0 only these, as sbatch --array takes them: `--from stage0 --shards 3,7` after two failed
#
# The same command again is safe: what is done is found done, what was begun goes on, and two jobs never write into one
# folder. Prints step and job id; appends them to WORK/logs/jobs.txt. If a job fails, those behind it are removed.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
fail() {
  echo "error: $*" >&2
  exit 2
}
steps=(convert stage0 fit stage1 stage2 export evaluate)
settings=${1:?is missing: bash launch/slurm/submit_chain.sh SETTINGS.sh}
shift
from=convert to=evaluate dry='' shards=''
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --from | --to | --shards)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift
      ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
for name in "$from" "$to"; do
  [[ " ${steps[*]} " == *" $name "* ]] || fail "--from/--to $name: no such step; choose one of ${steps[*]}"
done
[[ $settings == /* ]] || settings=${OLDPWD:-$PWD}/$settings
set -- "$settings"
ZEDA_DRY_RUN=$dry source launch/slurm/job.sh # reads and checks the settings
trap - USR1 USR2 TERM
unset ZEDA_DRY_RUN # sbatch would hand it to the jobs
: "${SAVE_SECONDS:=600}"
declare -p SBATCH_FLAGS &>/dev/null || SBATCH_FLAGS=()
[[ $WORK == /* ]] || fail "WORK=$WORK: give an absolute path, the nodes must find it"
[[ -f $HF/config.json ]] || fail "HF=$HF: has no config.json"
((${#ROLLOUTS[@]})) || [[ -f ${PROMPTS:-} ]] || fail "PROMPTS=${PROMPTS:-}: no such file"
[[ -z ${HELDOUT:-} || -f $HELDOUT ]] || fail "HELDOUT=$HELDOUT: no such file"
[[ -n $dry ]] || mkdir -p "$WORK/logs" "$WORK/rollouts"

wanted() { # whether a step is part of this chain
  case $1 in
    stage0) ((${#ROLLOUTS[@]} == 0)) || return 1 ;;
    fit) [[ $begin == */fitted ]] || return 1 ;;
    stage1) ((STAGE1)) || return 1 ;;
    stage2) ((STAGE1 && STAGE2)) || return 1 ;;
    evaluate) [[ -n ${HELDOUT:-} ]] || return 1 ;;
  esac
  local step inside=''
  for step in "${steps[@]}"; do
    [[ $step != "$from" ]] || inside=1
    [[ $step != "$1" ]] || { [[ -n $inside ]] && return 0 || return 1; }
    [[ $step != "$to" ]] || return 1
  done
}

place() { # sbatch's flags of a step, into `line`
  local nodes=1 tasks=1 time=TIME_${1^^} limit=04:00:00 gpus=0
  case $1 in
    stage0) nodes=$STAGE0_NODES tasks=$TASKS_PER_NODE limit=24:00:00 gpus=$GPUS_PER_NODE ;;
    fit) gpus=$GPUS_PER_NODE ;;
    stage1 | stage2) nodes=$NODES tasks=$TASKS_PER_NODE limit=24:00:00 gpus=$GPUS_PER_NODE ;;
    evaluate) nodes=$NODES tasks=$TASKS_PER_NODE limit=04:00:00 gpus=$GPUS_PER_NODE ;;
  esac
  line=(sbatch --parsable --job-name="zeda-$1" --nodes="$nodes" --ntasks-per-node="$tasks" --time="${!time:-$limit}")
  ((gpus == 0)) || line+=(--gpus-per-node="$gpus")
  [[ -z $CPUS_PER_TASK ]] || line+=(--cpus-per-task="$CPUS_PER_TASK")
  case $1 in stage*) line+=(--signal="B:USR1@$SAVE_SECONDS") ;; esac
  if [[ $1 == stage0 ]]; then
    line+=(--array="${shards:-0-$((SHARDS - 1))}" --output="$WORK/logs/$1-%A_%a.log")
  else
    line+=(--output="$WORK/logs/$1-%j.log")
  fi
  [[ -z $before ]] || line+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
  line+=("${SBATCH_FLAGS[@]}" "launch/slurm/$1.sbatch" "$settings")
}

before=''
for step in "${steps[@]}"; do
  wanted "$step" || continue
  place "$step"
  if [[ -n $dry ]]; then
    quoted "${line[@]}"
    ZEDA_DRY_RUN=1 SLURM_ARRAY_TASK_ID=${shards%%[-,:%]*} bash "launch/slurm/$step.sbatch" "$settings"
    before=JOB_OF_${step^^}
    continue
  fi
  job=$("${line[@]}") || fail "$step was not submitted; what stands above was: scancel it before you submit again"
  before=${job%%;*} # a job of another cluster is "id;cluster"
  echo "$step $before" | tee -a "$WORK/logs/jobs.txt"
done
