#!/usr/bin/env bash
# Runs the tests of the files for transformers with other versions of it, each in a small environment of its own:
#   bash tests/serving/transformers_env.sh [VERSION...] [-- pytest arguments]
# Without a version: those of docs/evidence/serving.md, and the newest. An environment sees the packages of .venv (launch/venv.sh)
# and has its own transformers, and what that wants in another version, before them: PyTorch is not installed again.
# ZEDA_TRANSFORMERS_VENVS=DIR: where the environments are (default .venv-transformers).

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source launch/venv.sh
source tests/serving/layered_venv.sh
zeda_venv test

versions=()
while (($#)) && [[ $1 != -- ]]; do
  versions+=("$1")
  shift
done
[[ ${1:-} != -- ]] || shift
((${#versions[@]})) || versions=(5.0.0 5.14.1 5.17.0 newest)
root=${ZEDA_TRANSFORMERS_VENVS:-$PWD/.venv-transformers}
tests=(tests/serving tests/models tests/evaluation/quality/test_export_check.py tests/tools/test_measure_serving.py)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
failed=()
for version in "${versions[@]}"; do
  case $version in
    newest) wanted="transformers<6" ;;
    *) wanted="transformers==$version" ;;
  esac
  layered_venv "$root/$version" "$PYTHON" --upgrade "$wanted"
  python=$root/$version/bin/python
  echo "transformers $("$python" -c 'import transformers; print(transformers.__version__)')"
  "$python" -m pytest -q --disable-warnings "${tests[@]}" "$@" || failed+=("$version")
done
if ((${#failed[@]})); then
  echo "error: tests failed with transformers ${failed[*]}" >&2
  exit 1
fi
