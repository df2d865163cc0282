#!/usr/bin/env bash
# Trains the quickstart's teacher from random weights, with this package, and exports it as an HF folder.
#
#   bash examples/quickstart/train_teacher.sh WORK_DIR
#
# Over an hour on two cores. The result that is committed in teacher/ came from these steps; teacher/README.md has
# its log and hash. Another Python version has another standard library, hence other code to learn from.
set -euo pipefail
WORK=${1:?"usage: train_teacher.sh WORK_DIR"}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
source "$ROOT/launch/venv.sh"
zeda_venv quickstart

# 1. Data: prose, code and checkable tasks, with a tokenizer trained on them.
"$PYTHON" "$HERE/corpus.py" --out "$WORK/corpus"

# 2. An HF folder without weights: geometry and tokenizer.
mkdir -p "$WORK/geometry"
cp "$HERE/teacher/config.json" "$WORK/corpus/tokenizer/"* "$WORK/geometry/"

# 3. Train on all cores of this machine, one data-parallel process each; then on the families that are still weak.
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
bash "$ROOT/launch/pretrain_zeda.sh" --config "$HERE/teacher.yaml" \
    --hf-config "$WORK/geometry" --data-path "$WORK/corpus/train.jsonl" --save "$WORK/run"
"$PYTHON" "$HERE/focus.py" --train "$WORK/corpus/train.jsonl" --out "$WORK/corpus/focus.jsonl"
bash "$ROOT/launch/pretrain_zeda.sh" --config "$HERE/teacher_focus.yaml" --num-zero-experts 0 \
    --hf-config "$WORK/geometry" --pretrained-checkpoint "$WORK/run" --data-path "$WORK/corpus/focus.jsonl" \
    --save "$WORK/run_focus"

# 4. Export; bf16 halves the folder.
"$PYTHON" "$ROOT/tools/checkpoint_convert.py" megatron-to-hf --megatron "$WORK/run_focus" \
    --hf-template "$WORK/geometry" --out "$WORK/teacher" --dtype bf16
echo "teacher: $WORK/teacher; held-out data: $WORK/corpus/heldout.jsonl; prompts: $WORK/corpus/prompts.jsonl"
