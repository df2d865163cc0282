#!/usr/bin/env bash
# The whole walk on a small trained teacher and real text; prints a table and writes a report.
#
#   bash examples/quickstart/run.sh [--model qwen3|glm] [--out DIR] [--arms a,b,...] [--full]
#
# Makes .venv and installs what is missing. With qwen3 under ten minutes on two cores after installation; --full takes
# longer, and so may glm (docs/glm.md).
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../../launch/venv.sh"
zeda_venv
exec "$PYTHON" "$HERE/quickstart.py" "$@"
