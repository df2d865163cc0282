#!/usr/bin/env bash
# Trains a teacher of the quickstart with this package and exports it as an HF folder: the Qwen3-MoE from random weights,
# the GLM, and a Qwen3-MoE with few and wide experts, from that one's weights, rewritten for their shapes.
#
#   bash examples/quickstart/train_teacher.sh WORK_DIR [--model qwen3|glm|wide]
#
# About two hours on two cores; glm and wide take minutes. What is committed in teacher/ and glm/teacher/ came from these
# steps; README.md there has log and hash. Another Python version has another standard library, hence other code to learn
# from.
set -euo pipefail
WORK=${1:?"usage: train_teacher.sh WORK_DIR [--model qwen3|glm|wide]"}
MODEL=qwen3
if [[ ${2:-} == --model ]]; then
  MODEL=${3:?"--model qwen3, --model glm or --model wide"}
fi
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
case $MODEL in
  qwen3) RECIPE=$HERE CONFIG=$HERE/teacher/config.json ;;
  glm) RECIPE=$HERE/glm CONFIG=$HERE/glm/teacher/config.json ;;
  wide) RECIPE=$HERE/wide CONFIG=$HERE/wide/config.json ;;
  *) echo "error: --model $MODEL is unknown; choose qwen3, glm or wide" >&2; exit 2 ;;
esac
source "$ROOT/launch/venv.sh"
zeda_venv quickstart

# 1. Data: prose, code and checkable tasks, with a tokenizer trained on them.
"$PYTHON" "$HERE/corpus.py" --out "$WORK/corpus"

# 2. An HF folder without weights: geometry and tokenizer.
mkdir -p "$WORK/geometry"
cp "$CONFIG" "$WORK/corpus/tokenizer/"* "$WORK/geometry/"

# 3. Train on all cores of this machine, one data-parallel process each.
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
train() {
  bash "$ROOT/launch/pretrain_zeda.sh" --num-zero-experts 0 --hf-config "$WORK/geometry" "$@"
}
focus() { # OUT [flags]
  "$PYTHON" "$HERE/focus.py" --corpus "$WORK/corpus" --out "$WORK/corpus/$1" "${@:2}"
}
if [[ $MODEL == qwen3 ]]; then
  # On everything; then on what the families that are still weak have in the corpus; then on new questions of three.
  train --config "$HERE/teacher.yaml" --data-path "$WORK/corpus/train.jsonl" --save "$WORK/first"
  focus focus.jsonl
  train --config "$HERE/teacher_focus.yaml" --data-path "$WORK/corpus/focus.jsonl" \
      --pretrained-checkpoint "$WORK/first" --save "$WORK/second"
  focus fresh.jsonl --fresh 60000 --rest 0.3 --families number_filtering,needle_haystack,family_relationships
  train --config "$HERE/teacher_fresh.yaml" --data-path "$WORK/corpus/fresh.jsonl" \
      --pretrained-checkpoint "$WORK/second" --save "$WORK/third"
  LAST=third
else
  # From the first teacher's weights, rewritten: mend what the new shapes made of them, on all kinds of text.
  "$PYTHON" "$RECIPE/first_weights.py" --qwen "$HERE/teacher" --config "$CONFIG" --out "$WORK/rewritten"
  "$PYTHON" "$ROOT/tools/checkpoint_convert.py" hf-to-megatron --hf "$WORK/rewritten" --out "$WORK/start" --dtype fp32
  focus four.jsonl --fresh 60000 --rest 0.3 \
      --families word_sequence_reversal,number_filtering,family_relationships,rotate_matrix
  head -n 40000 "$WORK/corpus/four.jsonl" > "$WORK/corpus/mend.jsonl"
  train --config "$RECIPE/teacher.yaml" --data-path "$WORK/corpus/mend.jsonl" \
      --pretrained-checkpoint "$WORK/start" --save "$WORK/first"
  LAST=first
fi

# 4. Export; bf16 halves the folder.
"$PYTHON" "$ROOT/tools/checkpoint_convert.py" megatron-to-hf --megatron "$WORK/$LAST" \
    --hf-template "$WORK/geometry" --out "$WORK/teacher" --dtype bf16
echo "teacher: $WORK/teacher; held-out data: $WORK/corpus/heldout.jsonl; prompts: $WORK/corpus/prompts.jsonl"
