#!/usr/bin/env bash
# Runs the default test suite with another version of Megatron-Core, in an environment of its own with Python 3.12:
#   bash tests/megatron_env.sh [VERSION] [-- pytest arguments]
# Without a version: the newest that setup.cfg allows. On x86-64 PyTorch's package for Python 3.12 brings the libraries of
# CUDA (6 GB in the environment); where pip knows PyTorch's index of CPU builds, ZEDA_TORCH names one (launch/venv.sh).
# PYTHON=FILE: the Python 3.12 to use; else that on PATH, or the newest that pyenv has.
# ZEDA_MEGATRON_VENVS=DIR: where the environments are (default .venv-megatron); one that is there is used as it is until
# setup.cfg changes.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

version=newest
if (($#)) && [[ $1 != -- ]]; then
  version=$1
  shift
fi
if (($#)) && [[ $1 != -- ]]; then
  echo "error: '$1' comes after the version: bash tests/megatron_env.sh [VERSION] [-- pytest arguments]" >&2
  exit 2
fi
[[ ${1:-} != -- ]] || shift
case $version in
  newest) wanted=megatron-core ;;
  [0-9]*) wanted=megatron-core==$version ;;
  *)
    echo "error: '$version' is not a version; pytest arguments come after --" >&2
    exit 2
    ;;
esac
venv=${ZEDA_MEGATRON_VENVS:-$PWD/.venv-megatron}/$version

python_3_12() {
  local candidate
  local is_3_12='import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))'
  if [[ -n ${PYTHON:-} ]]; then
    "$PYTHON" -c "$is_3_12" 2>/dev/null && echo "$PYTHON" && return
    echo "error: PYTHON=$PYTHON is no Python 3.12" >&2
    return 2
  fi
  # On PATH may be pyenv's stand-in for a version that is not chosen here: each is asked.
  while read -r candidate; do
    if "$candidate" -c "$is_3_12" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done < <(echo python3.12; echo python3; printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12*/bin/python | sort -rV)
  echo "error: Megatron-Core 0.19 needs Python 3.12, and none is on PATH or among pyenv's versions: set PYTHON" >&2
  return 2
}

stamp=$venv/.zeda-$(sha256sum <setup.cfg | cut -c 1-16)
if [[ ! -e $stamp ]]; then
  if [[ ! -e $venv/bin/python ]]; then
    base=$(python_3_12)
    echo "making $venv with $base" >&2
    "$base" -m venv "$venv"
  fi
  pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  "$venv/bin/python" -c 'import torch' 2>/dev/null || "${pip[@]}" "$ZEDA_TORCH"
  "${pip[@]}" --upgrade --editable ".[test]" "$wanted" # what is named is upgraded, its requirements where they must be
  : >"$stamp"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
"$venv/bin/python" -c 'import sys; from importlib.metadata import version; print(
  "Megatron-Core", version("megatron-core"), "Python", sys.version.split()[0], "PyTorch", version("torch"))'
# Two tests at a time, as in tests/run.sh.
exec "$venv/bin/python" -m pytest -q --disable-warnings -n 2 "$@"
