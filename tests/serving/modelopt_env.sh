#!/usr/bin/env bash
# Runs the tests that need NVIDIA ModelOpt, in an environment of its own on top of .venv (launch/venv.sh):
#   bash tests/serving/modelopt_env.sh [pytest arguments]
# ZEDA_MODELOPT_VENV=DIR: where it is (default .venv-modelopt); one that is there is used as it is.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source launch/venv.sh
source tests/serving/layered_venv.sh
zeda_venv test

venv=${ZEDA_MODELOPT_VENV:-$PWD/.venv-modelopt}
# Newer versions of transformers are not ModelOpt's to test (its extra `hf`).
layered_venv "$venv" "$PYTHON" nvidia-modelopt==0.47.0 requests "transformers<5.15"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
exec "$venv/bin/python" -m pytest -q --disable-warnings tests/serving/test_quantize.py "$@"
