#!/usr/bin/env bash
# Makes .venv, installs, runs the default test suite: `bash tests/run.sh [pytest arguments]`.
# ZEDA_VENV=DIR uses an environment of yours instead; more in launch/venv.sh.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
zeda_venv test

# No test needs the network or more than one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two tests at a time (tests/side_by_side.py); `-n 0` is one, in this process, as a debugger wants it.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 2); fi
exec "$PYTHON" -m pytest "${workers[@]}" "$@"
