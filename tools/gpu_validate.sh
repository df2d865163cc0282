#!/usr/bin/env bash
# Every check that needs a GPU, in under ten minutes:
#
#   bash tools/gpu_validate.sh [--out DIR] [--only CHECK,...]
#   bash tools/gpu_validate.sh --first [--out DIR]
#
# --first are the kernels' first seven minutes on a new GPU, step by step, each under its own time limit and with a
# decision at its end (DIR/<date>_<gpu>/first.json); it needs torch, numpy and pytest alone, and a library built before.
# Runs the real commands on the quickstart's teacher: conversion, training on the GPU beside the same training on the
# CPU, bf16, the three memory modes of the teacher, paired zero experts, generation, stage 2, export; one MoE layer of
# Qwen3-30B-A3B and of GLM-4.7-Flash at full size in training, evaluation and serving; this project's kernels. Writes
# DIR/<date>_<gpu>.json and .md (default: docs/gpu). PYTHON chooses the interpreter; it needs this package's
# requirements and a CUDA PyTorch.
# ZEDA_VALIDATE_DEVICE=cpu walks through the same checks without a GPU, to test this script.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/env.sh"
python=${PYTHON:-$(command -v python || command -v python3)}

# This project's kernels of the checkout, unless they are installed: importable, and registered as `pip install -e` does.
if ! "$python" -c 'from importlib.metadata import version; version("zeda_kernels")' 2>/dev/null; then
  (cd "$root/kernels" && "$python" setup.py -q egg_info) ||
    echo "the kernels of this checkout are left out: pip install ./kernels" >&2
  export PYTHONPATH="$PYTHONPATH:$root/kernels"
fi
if [[ ${1:-} == --first ]]; then
  exec "$python" -m tools.gpu.first --root "$root" "${@:2}"
fi
"$python" "$root/tools/doctor.py" || { echo "error: install what the doctor misses first" >&2; exit 2; }
exec "$python" -m tools.gpu.validate --root "$root" "$@"
