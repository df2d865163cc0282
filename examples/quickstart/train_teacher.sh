#!/usr/bin/env bash
# Trains the quickstart's teacher from random weights, with this package, and exports it as an HF folder.
#
#   bash examples/quickstart/train_teacher.sh WORK_DIR
#
# About two hours on two cores. The result that is committed in teacher/ came from these steps; teacher/README.md has
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

# 3. Train on all cores of this machine, one data-parallel process each; then on what the families that are still
# weak have in the corpus; then on new questions of three of them.
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
train() {
  bash "$ROOT/launch/pretrain_zeda.sh" --num-zero-experts 0 --hf-config "$WORK/geometry" "$@"
}
train --config "$HERE/teacher.yaml" --data-path "$WORK/corpus/train.jsonl" --save "$WORK/first"
"$PYTHON" "$HERE/focus.py" --corpus "$WORK/corpus" --out "$WORK/corpus/focus.jsonl"
train --config "$HERE/teacher_focus.yaml" --data-path "$WORK/corpus/focus.jsonl" \
    --pretrained-checkpoint "$WORK/first" --save "$WORK/second"
"$PYTHON" "$HERE/focus.py" --corpus "$WORK/corpus" --out "$WORK/corpus/fresh.jsonl" --fresh 60000 --rest 0.3 \
    --families number_filtering,needle_haystack,family_relationships
train --config "$HERE/teacher_fresh.yaml" --data-path "$WORK/corpus/fresh.jsonl" \
    --pretrained-checkpoint "$WORK/second" --save "$WORK/third"

# 4. Export; bf16 halves the folder.
"$PYTHON" "$ROOT/tools/checkpoint_convert.py" megatron-to-hf --megatron "$WORK/third" \
    --hf-template "$WORK/geometry" --out "$WORK/teacher" --dtype bf16
echo "teacher: $WORK/teacher; held-out data: $WORK/corpus/heldout.jsonl; prompts: $WORK/corpus/prompts.jsonl"
