#!/usr/bin/env bash
# Multi-token prediction on the quickstart's GLM teacher: gives it a head, adapts model and head, counts accepted drafts.
#
#   bash examples/quickstart/glm/mtp.sh WORK_DIR
#
# Every step leaves a folder or a file in WORK_DIR and is left out where that exists.
set -euo pipefail
WORK=${1:?"usage: mtp.sh WORK_DIR"}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  source "$ROOT/launch/venv.sh"
  zeda_venv quickstart
fi
export PYTHON NPROC_PER_NODE=${NPROC_PER_NODE:-2} PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
QUICKSTART=$ROOT/examples/quickstart
mkdir -p "$WORK"

zeda() { "$PYTHON" -m zeda_megatron "$@"; }
train() { bash "$ROOT/launch/pretrain_zeda.sh" --data-path "$WORK/rollouts.jsonl" "$@"; }
made() { [[ -e $WORK/$1 ]] && echo "$1 is there already"; }

# 1. The teacher with a head that has learned nothing yet; its answers.
made headed || "$PYTHON" "$HERE/first_head.py" --teacher "$HERE/teacher" --out "$WORK/headed"
made begun || zeda convert hf-to-megatron --hf "$WORK/headed" --out "$WORK/begun" --mtp --dtype fp32
if ! made answered; then
  train --config "$QUICKSTART/stage0.yaml" --pretrained-checkpoint "$WORK/begun" \
      --data-path "$QUICKSTART/data/prompts.jsonl" --rollout-path "$WORK/rollouts.jsonl"
  touch "$WORK/answered"
fi

# 2. The head learns to draft for the teacher, which does not move. For comparison it goes on as long as the arms train.
trained=latest_checkpointed_iteration.txt
made "static/$trained" || train --config "$HERE/mtp_teacher.yaml" --pretrained-checkpoint "$WORK/begun" --save "$WORK/static"
made "longer/$trained" || train --config "$HERE/mtp_teacher.yaml" --train-iters 100 --lr 3e-4 --lr-warmup-fraction 0.1 \
    --min-lr 0 --pretrained-checkpoint "$WORK/static" --save "$WORK/longer"

# 3. Zero experts that wake up, fitted, then distilled with hidden states matched: without the head, and with it.
made fitted || zeda fit --pretrained-checkpoint "$WORK/static" --data-path "$WORK/rollouts.jsonl" --save "$WORK/fitted"
arm() { # NAME [flags]
  made "$1/$trained" || train --config "$QUICKSTART/stage1.yaml" --pretrained-checkpoint "$WORK/fitted" \
      --teacher-load "$WORK/static" --moe-router-load-balancing-type none --target-zero-share 0.516 \
      --hidden-loss-coeff 20 --lr 3e-4 --save "$WORK/$1" "${@:2}"
}
arm without
arm with --mtp-loss-scale 1

# 4. Which drafts are accepted, on held-out text and on greedy answers to held-out prompts.
for student in fitted without with; do
  made "$student.json" || zeda evaluate drafts --teacher "$WORK/static" --student "$WORK/$student" \
      --heldout "$QUICKSTART/data/heldout.jsonl" --own-answers 200 --out "$WORK/$student.json"
done
made longer.json || zeda evaluate drafts --teacher "$WORK/longer" --heldout "$QUICKSTART/data/heldout.jsonl" \
    --own-answers 200 --out "$WORK/longer.json"
"$PYTHON" "$HERE/mtp_table.py" "$WORK"
