#!/usr/bin/env bash
# The whole walk on a small trained teacher and real text; prints a table and writes a report.
#
#   bash examples/quickstart/run.sh [--model qwen3|glm|wide] [--out DIR] [--arms a,b,...] [--also a,b,...] [--full]
#
# wide: few, wide experts; `train_teacher.sh runs/wide --model wide` makes its teacher.
# Makes .venv and installs what is missing. Eight to thirteen minutes on two cores after installation; --also (for example
# net_stage2,top_p,dynamic_skipping) and --full (three seeds, the frontier) take longer.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../../launch/venv.sh"
zeda_venv quickstart
exec "$PYTHON" "$HERE/quickstart.py" "$@"
