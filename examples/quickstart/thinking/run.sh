#!/usr/bin/env bash
# A teacher that thinks, its adaptation by the default of `zeda fit` and stage 1, and what a dial by phase is worth:
#
#   bash examples/quickstart/thinking/run.sh WORK_DIR
#
# About half an hour on two cores.
set -euo pipefail
WORK=${1:?"usage: run.sh WORK_DIR"}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
source "$ROOT/launch/venv.sh"
zeda_venv quickstart
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
TEACHER=$HERE/../teacher
convert() { "$PYTHON" "$ROOT/tools/checkpoint_convert.py" "$@"; }

"$PYTHON" "$HERE/thinking.py" data --out "$WORK"
convert hf-to-megatron --hf "$TEACHER" --out "$WORK/start" --dtype fp32
bash "$ROOT/launch/pretrain_zeda.sh" --config "$HERE/teacher.yaml" --num-zero-experts 0 --hf-config "$TEACHER" \
    --pretrained-checkpoint "$WORK/start" --data-path "$WORK/train.jsonl" --save "$WORK/first"
convert megatron-to-hf --megatron "$WORK/first" --hf-template "$TEACHER" --out "$WORK/teacher"
convert hf-to-megatron --hf "$WORK/teacher" --out "$WORK/static"
"$PYTHON" "$ROOT/tools/fit_zero_rows.py" --pretrained-checkpoint "$WORK/static" --data-path "$WORK/rollouts.jsonl" \
    --save "$WORK/fitted"
bash "$ROOT/launch/pretrain_zeda.sh" --config "$HERE/../stage1.yaml" --moe-router-load-balancing-type none \
    --target-zero-share 0.5 --pretrained-checkpoint "$WORK/fitted" --data-path "$WORK/rollouts.jsonl" --save "$WORK/adapted"
convert megatron-to-hf --megatron "$WORK/adapted" --hf-template "$WORK/teacher" --out "$WORK/hf"
"$PYTHON" "$HERE/thinking.py" measure --hf "$WORK/hf" --heldout "$WORK/heldout.jsonl" --out "$WORK/phases.json"
